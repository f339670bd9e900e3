"""Which model it is: from shapes alone, then from what names it."""

from dataclasses import replace

import pytest
from flux2_mlx.convert import assembled, geometry, naming
from helpers.headers import cast, write
from helpers.listings import listing

from flux2_mlx.checkpoint import Component
from flux2_mlx.config import VARIANTS, TransformerConfig, VAEConfig
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.loading import module_tensors
from flux2_mlx.weights import TensorInfo

FOUR = ["klein-4b", "klein-base-4b"]
NINE = ["klein-9b", "klein-base-9b", "klein-9b-kv"]
ALL = [*FOUR, *NINE, "dev"]


def canonical(name):
    (reading,) = naming.read(listing(name), name).values()
    return reading.part, reading.infos


def rows(*names):
    return [VARIANTS[name] for name in names]


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        *((f"transformer_klein-4b_{short}", FOUR) for short in ("bfl", "diffusers")),
        *((f"transformer_klein-9b_{short}", NINE) for short in ("bfl", "diffusers")),
        *((f"transformer_dev_{short}", ["dev"]) for short in ("bfl", "diffusers")),
        ("qwen3-4b", FOUR),
        ("qwen3-8b", NINE),
        ("mistral3-24b", ["dev"]),
        ("mistral3-24b_new_naming", ["dev"]),
        ("vae_diffusers", ALL),
        ("vae_small_decoder_diffusers", ALL),
        ("ae_bfl", ALL),
    ],
)
def test_models_that_a_part_can_be_of(name, variants):
    assert [row.name for row in geometry.candidates(geometry.geometry(*canonical(name), "x"))] == variants


def test_parts_of_different_models_are_of_none():
    configs = geometry.geometry(*canonical("transformer_klein-4b_bfl"), "x") | geometry.geometry(
        *canonical("qwen3-8b"), "x"
    )
    assert geometry.candidates(configs) == []
    with pytest.raises(CheckpointError, match="x has parts of different models"):
        geometry.choose([], [], None, "x")


def test_the_demo_s_size_is_known_without_its_configs():
    row = VARIANTS["demo"]
    infos = module_tensors(Component("transformer", row.transformer, None, ()).build())
    configs = geometry.geometry("transformer", infos, "x")
    assert configs == {"transformer": row.transformer}
    assert geometry.candidates(configs) == [row]


@pytest.mark.parametrize("change", [{"num_layers": 6}, {"num_single_layers": 19}, {"mlp_ratio": 4.0}])
def test_a_transformer_of_another_size_is_refused(change):
    config = replace(VARIANTS["klein-4b"].transformer, **change)
    infos = module_tensors(Component("transformer", config, None, ()).build())
    with pytest.raises(
        CheckpointError, match=r"FLUX.2 transformer of no known size: 3072 features, . double and .. sin"
    ):
        geometry.geometry("transformer", infos, "x")


def test_what_shapes_cannot_tell_is_that_of_the_table(monkeypatch):
    odd = replace(VARIANTS["klein-4b"].transformer, rope_theta=7.0)
    monkeypatch.setitem(VARIANTS, "klein-4b", replace(VARIANTS["klein-4b"], transformer=odd))
    (config,) = geometry.geometry(*canonical("transformer_klein-4b_bfl"), "x").values()
    assert isinstance(config, TransformerConfig)
    assert config.rope_theta == 7.0


def qwen(width, layers, intermediate=None):
    """The tensors that tell of a Qwen3 of another size."""
    infos = dict(canonical("qwen3-4b")[1])
    infos["model.embed_tokens.weight"] = TensorInfo("BF16", (151936, width))
    if intermediate:
        infos["model.layers.0.mlp.gate_proj.weight"] = TensorInfo("BF16", (intermediate, width))
    beyond = {name: x for name, x in infos.items() if name.startswith("model.layers.") and _layer(name) >= layers}
    more = {f"model.layers.{n}.input_layernorm.weight": TensorInfo("BF16", (width,)) for n in range(36, layers)}
    return {name: x for name, x in infos.items() if name not in beyond} | more


def _layer(name):
    return int(name.split(".")[2])


@pytest.mark.parametrize(
    ("infos", "match"),
    [
        (
            qwen(1024, 28),
            "the text encoder is Qwen3-0.6B, with 1024 features, 9728 in between and 28 layers; FLUX.2 kl",
        ),
        (qwen(2048, 28), "is Qwen3-1.7B"),
        (qwen(5120, 40), "is Qwen3-14B"),
        (qwen(5120, 64), "is Qwen3-32B"),
        (qwen(2560, 36, 9216), "is a language model, with 2560 features, 9216 in between"),
        (qwen(2560, 26), "has 26 layers, but 27 to 36 are needed"),
        (qwen(2560, 37), "has 37 layers, but 27 to 36 are needed"),
    ],
)
def test_another_language_model_is_named(infos, match):
    with pytest.raises(CheckpointError, match=match):
        geometry.geometry("text_encoder", infos, "x")


@pytest.mark.parametrize("layers", [27, 30, 35])
def test_some_of_the_later_layers_write_no_text(layers):
    configs = geometry.geometry("text_encoder", qwen(2560, layers), "x")
    assert configs == {"text_encoder": replace(VARIANTS["klein-4b"].text, num_later_layers=0)}


def test_a_vision_tower_of_another_size_is_refused():
    part, infos = canonical("mistral3-24b")
    infos = infos | {"vision_tower.patch_conv.weight": TensorInfo("BF16", (1024, 3, 16, 16))}
    with pytest.raises(CheckpointError, match=r"vision tower is of no known size: .*'patch_size': 16"):
        geometry.geometry(part, infos, "x")


@pytest.mark.parametrize(
    ("latents", "whose"),
    [(4, "as that of Stable Diffusion"), (16, "as that of FLUX.1, SD3 or Qwen-Image"), (8, "of no known size")],
)
def test_another_vae_is_named(latents, whose):
    part, infos = canonical("ae_bfl")
    infos = infos | {"decoder.conv_in.weight": TensorInfo("F32", (512, latents, 3, 3))}
    with pytest.raises(CheckpointError, match=f"it is a VAE of {latents} latent channels, {whose}; FLUX.2's has 32"):
        geometry.geometry(part, infos, "x")


def test_the_decoder_of_the_vae_may_be_narrower():
    (config,) = geometry.geometry(*canonical("vae_small_decoder_diffusers"), "x").values()
    assert config == VAEConfig(decoder_block_out_channels=(96, 192, 384, 384))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_no_tensors_are_no_part(part):
    with pytest.raises(CheckpointError, match=r"x: there is no .*; fetch the file again"):
        geometry.geometry(part, {}, "x")


@pytest.mark.parametrize(
    ("hint", "variant"),
    [
        ("flux-2-klein-9b", "klein-9b"),
        ("flux-2-klein-base-9b", "klein-base-9b"),
        ("flux-2-klein-9b-kv-fp8", "klein-9b-kv"),
        ("FLUX.2-klein-9b-kv", "klein-9b-kv"),
        ("flux2Klein_9bBase", "klein-base-9b"),
        ("flux2Klein_9bKV", "klein-9b-kv"),
        ("flux2klein9bkv", "klein-9b-kv"),
        ("flux2kleinbase9b", "klein-base-9b"),
        ("FLUX_2_Klein_Base_9B_Q4_K_M", "klein-base-9b"),
        ("Flux2-Klein-9B-True-v1", "klein-9b"),
        ("FLUX.2 Klein 9B", "klein-9b"),
        ("klein-9b-turbo", "klein-9b"),
        ("klein-base-9b for ComfyUI", "klein-base-9b"),
    ],
)
def test_a_name_tells_the_model(hint, variant):
    assert geometry.choose(rows(*NINE), [hint], None, "x").name == variant


@pytest.mark.parametrize(
    "hint",
    [
        *("my database", "kvasir", "klein", "klein v4 bf16", "unet", "klein-9b-undistilled", "klein-9b de-distilled"),
        *("klein-9b-no-kv", "klein-9b-nonkv", "flux2-klein-9b-non-base", "klein9b_notbase", "klein-9b without kv"),
        *("klein-9b-turbo-8steps-from-base", "klein-9b-lightning-for-base", "fast 9b from the FLUX.2 klein base"),
        *("klein-base-9b-turbo-merge", "Klein-9B-Base-distilled"),
    ],
)
def test_a_name_that_does_not_tell(hint):
    with pytest.raises(
        CheckpointError, match=r"can't tell which model x is; .*\(klein-9b, klein-base-9b, klein-9b-kv\)"
    ):
        geometry.choose(rows(*NINE), [hint], None, "x")


def test_the_geometry_is_stronger_than_a_name():
    assert geometry.choose(rows("dev"), ["flux-2-klein-base-4b"], None, "x").name == "dev"
    assert geometry.choose(rows(*FOUR), ["flux-2-klein-9b"], None, "x").name == "klein-4b"
    with pytest.raises(CheckpointError, match="can't tell"):
        geometry.choose(rows(*FOUR), ["flux-2-klein-9b-kv"], None, "x")


def test_the_first_text_that_tells_decides():
    texts = ["thing", "klein-base-9b", "flux-2-klein-9b"]
    assert geometry.choose(rows(*NINE), texts, None, "x").name == "klein-base-9b"


def test_a_user_s_word_is_taken_where_the_geometry_allows_it():
    assert geometry.choose(rows(*NINE), ["klein-base-9b"], "klein-9b-kv", "x").name == "klein-9b-kv"
    with pytest.raises(CheckpointError, match="x can't be dev: its geometry is that of klein-4b, klein-base-4b"):
        geometry.choose(rows(*FOUR), [], "dev", "x")
    with pytest.raises(InputError, match="unknown model 'nonsense'"):
        geometry.choose(rows(*FOUR), [], "nonsense", "x")


def test_titles_come_from_metadata_then_file_then_repository():
    metadata = {"general.name": "Klein Base", "other": "x", "modelspec.title": "T", "general.basename": ""}
    texts = geometry.titles(metadata, "flux-2-klein.Q4.gguf", "kv-people/FLUX.2-klein-4B")
    assert texts == ["T", "Klein Base", "flux-2-klein.Q4", "FLUX.2-klein-4B"]
    url = {"general.base_model.0.repo_url": "https://huggingface.co/base/FLUX.2-klein-4B", "name": 7}
    assert geometry.titles(url) == ["FLUX.2-klein-4B"]


def test_dev_without_its_guidance_is_incomplete():
    part, infos = canonical("transformer_dev_bfl")
    left = {name: info for name, info in infos.items() if not name.startswith("guidance_in.")}
    with pytest.raises(
        CheckpointError, match=r"^x: there is no guidance_in\.in_layer\.weight and no guidance_in\.out_"
    ):
        geometry.geometry(part, left, "x")


def test_two_namings_in_one_file_are_told():
    original, other = listing("transformer_klein-4b_bfl"), listing("transformer_klein-4b_diffusers")
    mixed = {name: x for name, x in original.items() if not name.startswith("double_blocks.")}
    mixed |= {name: x for name, x in other.items() if name.startswith("transformer_blocks.")}
    (reading,) = naming.read(mixed, "x").values()
    _, problem = geometry.understood(reading, "x", "x is wrong")
    assert str(problem).startswith("x mixes namings: ")
    configs = geometry.geometry("transformer", naming.read(original, "x")["transformer"].infos, "x")
    with pytest.raises(CheckpointError, match=r"^x is wrong: it mixes namings: .*; fetch the file again, or give"):
        reading.check(configs, "x is wrong")
    assert "as of diffusers" in str(problem)
    assert "as of the original release" in str(problem)


def test_weights_of_64_bits_are_asked_for_in_fewer(tmp_path):
    path = write(tmp_path / "x.safetensors", cast(listing("transformer_klein-4b_bfl"), "F64"))
    with pytest.raises(CheckpointError, match=r"stored as F64, .* bf16, fp16 or fp32$"):
        assembled(path, {})
