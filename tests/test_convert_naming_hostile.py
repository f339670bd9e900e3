"""Names and shapes that are not those of a model are refused, in bounded time."""

import random
from contextlib import suppress

import pytest
from flux2_mlx.convert import geometry, naming
from helpers.listings import listing, prefixed, renamed, text_only

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

KLEIN = "transformer_klein-4b_bfl"


def check_all(tensors):
    for part, reading in naming.read(tensors, "x.safetensors").items():
        reading.check(geometry.geometry(part, reading.infos, "x"), "x.safetensors")


def refused(tensors, match):
    with pytest.raises(CheckpointError, match=match):
        check_all(tensors)


def changed(name, **tensors):
    """A listing with tensors of other shapes, or without those that are None; `__` stands for dots."""
    found = listing(name)
    for key, shape in tensors.items():
        found.pop(key.replace("__", "."), None)
        if shape is not None:
            found[key.replace("__", ".")] = TensorInfo("BF16", shape)
    return found


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"double_blocks__3__img_mlp__2__weight": None}, "x.safetensors: missing double_blocks.3.img_mlp.2.weight$"),
        ({"double_blocks__99999999__img_mlp__2__weight": (3072, 9216)}, "unexpected double_blocks.99999999.img_mlp"),
        ({"double_blocks__007__img_mlp__2__weight": (3072, 9216)}, "unexpected double_blocks.007.img_mlp"),
        ({"double_blocks__999__img_mlp__2__weight": (3072, 9216)}, "no known size: 3072 features, 6 double"),
        ({"transformer_blocks__0__attn__to_q__weight": (3072, 3072)}, "it mixes namings: img_in.weight as"),
        ({"double_blocks__1__txt_attn__q__weight": (3072, 3072)}, "unexpected double_blocks.1.txt_attn.q.weight$"),
        ({"double_blocks__1__img_attn__norm__key_norm__weight": (128,)}, "unexpected double_blocks.1.img_attn.norm"),
        (
            {"single_blocks__4__linear2__weight": (3072, 12289)},
            r"is BF16 \[3072, 12289\] instead of BF16 \[3072, 12288",
        ),
        ({"txt_in__weight": (3072, 12288)}, "FLUX.2 transformer of no known size"),
        ({"img_in__weight": (3072,)}, r"img_in.weight is of shape \[3072\]"),
        ({"img_in__weight": (0, 128)}, r"img_in.weight is of shape \[0, 128\]"),
        ({"img_in__weight": None}, "there is no img_in.weight"),
        ({"double_blocks__0__img_attn__norm__query_norm__scale": (127,)}, "do not divide into parts of 127"),
        ({"guidance_in__in_layer__weight": (3072, 256)}, "FLUX.2 transformer of no known size"),
        ({"double_blocks__*__img_mlp__2__weight": (3072, 9216)}, r"unexpected double_blocks\.\*\.img_mlp.2.weight$"),
        ({"foo": (1,)}, "unexpected foo$"),
        ({"": (1,)}, "unexpected "),
    ],
)
def test_what_does_not_fit_is_refused(changes, match):
    refused(changed(KLEIN, **changes), match)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("transformer_klein-4b_diffusers", "missing transformer.transformer_blocks.2.attn.to_k.weight$"),
        ("ae_bfl", "missing vae.decoder.up.3.block.1.conv2.bias$"),
        ("mistral3-24b", "missing text_encoder.language_model.model.layers.7.mlp.up_proj.weight$"),
    ],
)
def test_what_is_missing_has_its_name_in_the_file(name, match):
    missing = match.removeprefix("missing ").removesuffix("$")
    prefix, _, rest = missing.partition(".")
    tensors = listing(name)
    del tensors[rest]
    refused(prefixed(tensors, f"{prefix}."), match)


def test_one_wrong_size_under_another_is_refused():
    """Half of klein 4B, half of klein 9B: the size is told by some tensors, and all others are compared."""
    small, large = listing(KLEIN), listing("transformer_klein-9b_bfl")
    refused(large | small, "transformer of no known size")
    refused(small | {name: large[name] for name in small if "double_blocks.2" in name}, "is BF16")


def test_two_dialects_in_one_file_are_refused():
    mixed = listing(KLEIN) | listing("transformer_klein-4b_diffusers")
    refused(mixed, "it mixes namings: .*, img_in.weight as of the original release")
    refused(listing("ae_bfl") | listing("vae_diffusers"), "it mixes namings: encoder.conv_in.weight as of diffusers")


@pytest.mark.parametrize(
    ("is_stray", "said"),
    [
        (lambda name: name == "txt_in.weight", "model.diffusion_model.txt_in.weight after model.diffusion_model."),
        (lambda name: name != "txt_in.weight", "txt_in.weight without a prefix"),
    ],
)
def test_a_prefix_of_some_tensors_is_named(is_stray, said):
    names = {name: f"model.diffusion_model.{name}" if is_stray(name) else name for name in listing(KLEIN)}
    tensors = {names[name]: info for name, info in listing(KLEIN).items()}
    _, problem = geometry.understood(naming.read(tensors, "x")["transformer"], "x", "x")
    assert str(problem).startswith("x mixes prefixes: ")
    assert f", and {said}; fetch the file again" in str(problem)


def test_two_transformers_in_one_file_are_refused():
    refused(listing(KLEIN) | prefixed(listing(KLEIN), "model.diffusion_model."), "unexpected")


@pytest.mark.parametrize(
    "name", ["decoder.up.999.block.0.conv1.weight", "decoder.up.x.weight", "decoder.up.*.block.*.conv1.weight"]
)
def test_odd_levels_of_the_vae_are_refused(name):
    refused(listing("ae_bfl") | {name: TensorInfo("F32", (1, 1, 1, 1))}, "there is no|unexpected decoder.up")


def test_odd_layers_of_a_text_encoder_that_writes_nothing_are_refused():
    tensors = text_only(listing("mistral3-24b"), 30) | {"model.layers.99999999.x": TensorInfo("BF16", (1,))}
    refused(tensors, "unexpected model.layers.99999999.x$")


def test_too_many_tensors_are_refused_at_once():
    tensors = dict.fromkeys((f"double_blocks.{n}.x" for n in range(naming.MAX_TENSORS + 1)), TensorInfo("F32", (1,)))
    refused(tensors, "holds 50001 tensors, more than any FLUX.2 model has")


@pytest.mark.parametrize("name", ["double_blocks." * 100_000, "layers.1." * 100_000, "a" * 3_000_000])
def test_very_long_names_are_refused_at_once(name):
    refused(listing(KLEIN) | {name: TensorInfo("F32", (1,))}, "holds a tensor with a name of [0-9]+ characters")


@pytest.mark.parametrize("tensors", [{}, {"weight": TensorInfo("F32", (1,))}])
def test_what_is_nothing_known_is_refused(tensors):
    refused(tensors, "x.safetensors holds no FLUX.2 model, but (no tensors|weight); give a transformer")


def test_a_vae_of_which_some_convolutions_have_channels_last_is_refused():
    tensors = renamed(listing("vae_diffusers"), [("attentions.0.to_out.0.", "attentions.0.to_out.")])
    refused(tensors, "it is a VAE of 3 latent channels, of no known size")
    tensors["decoder.conv_in.weight"] = TensorInfo("BF16", (512, 3, 3, 32))
    refused(tensors, "instead of")


def damaged_name(name, chance):
    return chance.choice(
        (
            name[: chance.randrange(len(name))],
            name.replace(".", "..", 1),
            name.replace("0", chance.choice(("7", "999", "1000", "007", "-1", "*", "٣", "9" * 30)), 1),
            name + chance.choice((".lora_A.weight", ".lokr_w1", ".x", "*", "\n")),
            "".join(chance.sample(name, len(name))),
            chance.choice(("model.", "vae.", "transformer.", ".")) + name,
            name.upper(),
        )
    )


@pytest.mark.parametrize("name", [KLEIN, "transformer_klein-4b_diffusers", "ae_bfl", "qwen3-4b", "mistral3-24b"])
@pytest.mark.parametrize("seed", range(8))
def test_damage_raises_nothing_but_errors_of_checkpoints(name, seed):
    chance = random.Random(seed)
    tensors = listing(name)
    for _ in range(chance.choice((1, 2, 5, 50))):
        key = chance.choice(list(tensors))
        tensor = tensors.pop(key)
        if chance.random() < 0.3:
            shape = chance.choice(((), (0,), (0, 0), (1,), (2**31 - 1,) * 2, (2**31 - 1,) * 4, (1, 2, 3, 4, 5)))
            tensors[key] = TensorInfo(tensor.dtype, shape)
        elif chance.random() < 0.7:
            tensors[damaged_name(key, chance)] = tensor
    with suppress(CheckpointError):
        check_all(tensors)
        assert tensors.keys() == listing(name).keys()
