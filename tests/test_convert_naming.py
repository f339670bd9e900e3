"""Which parts of a model tensors are, in every naming at full size, and how canonical tensors are made of them."""

from dataclasses import replace

import mlx.core as mx
import pytest
from flux2_mlx.convert import geometry, naming
from flux2_mlx.convert.rules import channels_last, copy
from helpers.listings import listing, prefixed, renamed, text_only
from helpers.mlx_state import nothing_allocated

from flux2_mlx.checkpoint import Component
from flux2_mlx.config import VARIANTS, VAEConfig
from flux2_mlx.errors import CheckpointError
from flux2_mlx.loading import module_tensors
from flux2_mlx.weights import TensorInfo

KLEIN = "transformer_klein-4b_bfl"
ORIGINAL, DIFFUSERS = "the original release", "diffusers"
SMALL_DECODER = VAEConfig(decoder_block_out_channels=(96, 192, 384, 384))
TRANSFORMER_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
WRAPPERS = ("net.", "module.", "_orig_mod.", "model_ema.", "module._orig_mod.", "model._orig_mod.", "model_ema.module.")
VAE_PREFIXES = ("", "vae.", "first_stage_model.")
QWEN_PREFIXES = ("", "text_encoder.", "text_encoders.qwen3_4b.transformer.", "qwen3_8b.transformer.", "qwen3_4b.")
MISTRAL_PREFIXES = ("", "text_encoders.mistral3_24b.transformer.", "cond_stage_model.")
ON_DISK, NEW = "Mistral on disk", "Mistral of transformers since 4.52"
# A listing, its part, its dialect, the prefixes it is seen with, the variant whose networks are made of it.
LISTINGS = [
    *(
        (f"transformer_{variant}_{short}", "transformer", dialect, TRANSFORMER_PREFIXES, variant)
        for variant in ("dev", "klein-4b", "klein-9b")
        for short, dialect in (("bfl", ORIGINAL), ("diffusers", DIFFUSERS))
    ),
    ("vae_diffusers", "vae", DIFFUSERS, VAE_PREFIXES, "dev"),
    ("vae_small_decoder_diffusers", "vae", DIFFUSERS, VAE_PREFIXES, "dev"),
    ("ae_bfl", "vae", ORIGINAL, VAE_PREFIXES, "dev"),
    ("qwen3-4b", "text_encoder", "transformers", QWEN_PREFIXES, "klein-4b"),
    ("qwen3-8b", "text_encoder", "transformers", QWEN_PREFIXES, "klein-9b"),
    ("mistral3-24b", "text_encoder", ON_DISK, MISTRAL_PREFIXES, "dev"),
    ("mistral3-24b_new_naming", "text_encoder", NEW, MISTRAL_PREFIXES, "dev"),
]
CASES = [(*rest, prefix, variant) for *rest, prefixes, variant in LISTINGS for prefix in prefixes]
LLAMA = (
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("model.layers.", "blk."),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)


@pytest.fixture(autouse=True)
def _nothing_allocated():
    with nothing_allocated():
        yield


def understood(tensors, part):
    """The reading of the one part that there is, checked against what its geometry asks for, and the geometries."""
    (reading,) = naming.read(tensors, "x.safetensors").values()
    assert reading.part == part
    configs = geometry.geometry(part, reading.infos, "x")
    reading.check(configs, "x.safetensors")
    return reading, configs


def sources(reading, configs):
    """All source tensors that our networks are made of, each as often as it is read."""
    read = []
    for network, config in configs.items():
        rule_for = reading.rules_for(network, config)
        for name, tensor in module_tensors(Component(network, config, None, ()).build()).items():
            read += rule_for(name, tensor.shape).sources
    return read


@pytest.mark.parametrize(("name", "part", "dialect", "prefix", "variant"), CASES)
def test_every_tensor_of_a_released_file_is_read_once(name, part, dialect, prefix, variant):
    tensors = prefixed(listing(name), prefix)
    reading, configs = understood(tensors, part)
    assert (reading.dialect.name, reading.prefix, reading.unknown) == (dialect, prefix, [])
    counter = {f"{prefix}bn.num_batches_tracked"} & tensors.keys()
    assert sorted(sources(reading, configs)) == sorted(tensors.keys() - counter)
    row = VARIANTS[variant]
    expected = {
        "transformer": {"transformer": row.transformer},
        "vae": {"vae": SMALL_DECODER if "small" in name else row.vae},
        "text_encoder": {"text_encoder": row.text, "language_model": row.text},
    }[part]
    if "mistral" in name:
        expected["vision"] = row.vision
    assert configs == expected


@pytest.mark.parametrize("variant", ["dev", "klein-4b", "klein-9b"])
@pytest.mark.parametrize("short", ["bfl", "diffusers"])
def test_canonical_tensors_of_a_transformer_are_ours(variant, short):
    reading, _ = understood(listing(f"transformer_{variant}_{short}"), "transformer")
    assert reading.infos == listing(f"transformer_{variant}_bfl")


def test_canonical_tensors_of_the_original_vae_are_those_of_diffusers():
    reading, _ = understood(listing("ae_bfl"), "vae")
    shapes = {name: tensor.shape for name, tensor in reading.infos.items()}
    assert shapes == {name: tensor.shape for name, tensor in listing("vae_diffusers").items()}


def test_canonical_tensors_of_mistral_are_the_same_in_both_namings():
    infos = [understood(listing(name), "text_encoder")[0].infos for name in ("mistral3-24b", "mistral3-24b_new_naming")]
    assert infos[0] == infos[1]
    assert len(infos[0]) == 585


def test_norms_of_the_original_release_may_be_called_weight():
    tensors = renamed(listing("transformer_klein-4b_bfl"), [("_norm.scale", "_norm.weight")])
    reading, configs = understood(tensors, "transformer")
    assert sorted(sources(reading, configs)) == sorted(tensors)


@pytest.mark.parametrize("form", ["{}", "{}_proj", "to_{}"])
def test_queries_keys_and_values_may_be_split_in_some_blocks(form):
    tensors = listing("transformer_klein-4b_bfl")
    fused = tensors.pop("double_blocks.1.txt_attn.qkv.weight")
    third = replace(fused, shape=(3072, 3072))
    names = [f"double_blocks.1.txt_attn.{form.format(x)}.weight" for x in "qkv"]
    reading, configs = understood(tensors | dict.fromkeys(names, third), "transformer")
    assert reading.infos["double_blocks.1.txt_attn.qkv.weight"] == fused
    assert reading.rule("double_blocks.1.txt_attn.qkv.weight").sources == tuple(names)
    assert len(sources(reading, configs)) == len(tensors) + 3


def test_attention_of_the_vae_may_be_matrices_or_convolutions():
    tensors = listing("ae_bfl")
    for name, tensor in tensors.items():
        if "attn_1" in name and len(tensor.shape) == 4:
            tensors[name] = replace(tensor, shape=tensor.shape[:2])
    reading, configs = understood(tensors, "vae")
    assert reading.infos["encoder.mid_block.attentions.0.to_q.weight"].shape == (512, 512)
    assert configs == {"vae": VAEConfig()}


def test_the_small_decoder_in_the_original_naming():
    wide, small = listing("vae_diffusers"), listing("vae_small_decoder_diffusers")
    reading, _ = understood(listing("ae_bfl"), "vae")
    theirs = {ours: reading.rule(ours).sources[0] for ours in wide}
    tensors = {theirs[ours]: replace(tensor, shape=small[ours].shape) for ours, tensor in wide.items()}
    assert understood(tensors, "vae")[1] == {"vae": SMALL_DECODER}


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-8b"])
def test_a_text_encoder_saved_without_its_head(name):
    tensors = {key.removeprefix("model."): x for key, x in listing(name).items() if key != "lm_head.weight"}
    reading, configs = understood(tensors, "text_encoder")
    assert reading.dialect.name == "transformers without a head"
    assert ("language_model" in configs) == (name == "qwen3-4b")


def test_mistral_cut_to_its_first_layers_has_no_norm_and_writes_no_text():
    tensors = text_only(listing("mistral3-24b"), 30) | {naming.TEKKEN: TensorInfo("U8", (19_399_895,))}
    _, configs = understood(tensors, "text_encoder")
    assert configs == {"text_encoder": replace(VARIANTS["dev"].text, num_later_layers=0)}


@pytest.mark.parametrize(
    ("name", "dialect", "variant"),
    [("qwen3-4b", "llama.cpp", "klein-4b"), ("mistral3-24b", "llama.cpp, with permuted heads", "dev")],
)
def test_names_of_llama_cpp(name, dialect, variant):
    tensors = renamed(text_only(listing(name)), LLAMA)
    reading, configs = understood(tensors, "text_encoder")
    assert reading.dialect.name == dialect
    assert sorted(sources(reading, configs)) == sorted(tensors)
    assert configs["text_encoder"] == VARIANTS[variant].text


def test_names_of_mflux():
    pairs = [("embed.timestep_embedder.", "embed."), ("blocks.3.attn.to_out.0.", "blocks.3.attn.to_out.")]
    tensors = renamed(listing("transformer_klein-4b_diffusers"), pairs)
    reading, configs = understood(tensors, "transformer")
    assert (reading.dialect.name, sorted(sources(reading, configs))) == (DIFFUSERS, sorted(tensors))
    assert reading.infos == listing(KLEIN)


def test_the_vae_of_mflux_has_channels_last():
    tensors = renamed(listing("vae_small_decoder_diffusers"), [("attentions.0.to_out.0.", "attentions.0.to_out.")])
    shapes = {name: x.shape for name, x in tensors.items() if len(x.shape) == 4}
    tensors |= {name: TensorInfo("BF16", (o, h, w, i)) for name, (o, i, h, w) in shapes.items()}
    reading, configs = understood(tensors, "vae")
    assert (reading.dialect.name, configs) == ("mflux", {"vae": SMALL_DECODER})
    assert {name: x.shape for name, x in reading.infos.items() if name in shapes} == shapes
    rule = reading.composed(channels_last("encoder.conv_in.weight"))
    assert rule.source_shape((4, 2, 1, 3)) == (4, 2, 1, 3)
    kernel = mx.arange(24).reshape(4, 2, 1, 3)
    assert mx.array_equal(rule.apply(kernel), kernel)


@pytest.mark.parametrize("prefix", ["unet.", "base.layer.", "optimizer.exp_avg."])
@pytest.mark.parametrize(("name", "part"), [(KLEIN, "transformer"), ("qwen3-4b", "text encoder"), ("ae_bfl", "VAE")])
def test_an_unknown_prefix_is_told(name, part, prefix):
    message = f"^x holds the {part} of a FLUX.2 model after '{prefix}', which no known tool writes; if these are its "
    with pytest.raises(CheckpointError, match=message.replace(".", "[.]")):
        naming.read(prefixed(listing(name), prefix), "x")


@pytest.mark.parametrize("prefix", ["dit.", "pipe.dit.", "net.", "net.model."])
def test_prefixes_of_trainers(prefix):
    reading, _ = understood(prefixed(listing(KLEIN), prefix), "transformer")
    assert (reading.prefix, reading.unknown) == (prefix, [])


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize(("name", "part"), [(KLEIN, "transformer"), ("ae_bfl", "vae"), ("qwen3-4b", "text_encoder")])
def test_what_training_puts_before_names(name, part, prefix):
    own = {"transformer": "model.", "text_encoder": "text_encoder.", "vae": "vae."}[part]
    prefix = prefix.replace("model.", own)
    counters = {"model_ema.decay": TensorInfo("F32", ()), "model_ema.num_updates": TensorInfo("I64", ())}
    extras = counters if prefix.startswith("model_ema.") else {}
    reading, _ = understood(prefixed(listing(name), prefix) | extras, part)
    assert reading.prefix == prefix


def test_an_average_beside_the_weights_is_refused():
    tensors = prefixed(listing(KLEIN), "diffusion_model.")
    twice = "holds weights twice, the second time after model_ema.; give a file of one of them"
    with pytest.raises(CheckpointError, match=f"^x {twice}$"):
        naming.read(tensors | prefixed(listing(KLEIN), "model_ema.diffusion_model."), "x")
    joined = {f"model_ema.{name.replace('.', '')}": info for name, info in listing(KLEIN).items()}
    with pytest.raises(CheckpointError, match=r"whose name after model_ema\. is of no FLUX\.2 model"):
        naming.read(joined, "x")


def test_an_all_in_one_file():
    tensors = {
        **prefixed(listing("transformer_klein-9b_bfl"), "model.diffusion_model."),
        **prefixed(listing("qwen3-8b"), "text_encoders.qwen3_8b.transformer."),
        **prefixed(listing("ae_bfl"), "first_stage_model."),
        "text_encoders.qwen3_8b.logit_scale": TensorInfo("F32", ()),
    }
    readings = naming.read(tensors, "x")
    configs = {}
    for part, reading in readings.items():
        configs |= geometry.geometry(part, reading.infos, "x")
        reading.check(geometry.geometry(part, reading.infos, "x"), "x")
    assert {part: reading.prefix for part, reading in readings.items()} == {
        "transformer": "model.diffusion_model.",
        "text_encoder": "text_encoders.qwen3_8b.transformer.",
        "vae": "first_stage_model.",
    }
    assert [row.name for row in geometry.candidates(configs)] == ["klein-9b", "klein-base-9b", "klein-9b-kv"]


def test_parts_without_prefixes_in_one_file():
    tensors = listing("transformer_klein-4b_bfl") | listing("qwen3-4b") | listing("vae_diffusers")
    readings = naming.read(tensors, "x")
    assert {part: len(reading.sources) for part, reading in readings.items()} == {
        "transformer": 149,
        "text_encoder": 398,
        "vae": 251,
    }


def test_rows_are_exchanged_only_in_the_naming_of_diffusers():
    rows = mx.array([[1.0], [2.0], [3.0], [4.0]])
    made = {}
    for short in ("bfl", "diffusers"):
        reading, _ = understood(listing(f"transformer_klein-4b_{short}"), "transformer")
        made[short] = reading.rule("final_layer.adaLN_modulation.1.weight").apply(rows).flatten().tolist()
    assert made == {"bfl": [1, 2, 3, 4], "diffusers": [3, 4, 1, 2]}


def test_heads_of_llama_cpp_become_halves_again():
    """The converter of llama.cpp puts row j of a head's first half before row j of its second half."""
    heads, head_dim = 3, 8
    original = mx.arange(heads * head_dim * 2).reshape(heads * head_dim, 2)
    stored = original.reshape(heads, 2, head_dim // 2, 2).swapaxes(1, 2).reshape(original.shape)
    reading, _ = understood(renamed(text_only(listing("mistral3-24b"), 30), LLAMA), "text_encoder")
    for x in "qk":
        rule = reading.rule(f"model.layers.0.self_attn.{x}_proj.weight", head_dim)
        assert mx.array_equal(rule.apply(stored), original)
    assert mx.array_equal(reading.rule("model.layers.0.self_attn.v_proj.weight").apply(stored), stored)


def test_a_convolution_of_one_pixel_becomes_a_matrix():
    reading, _ = understood(listing("ae_bfl"), "vae")
    rule = reading.composed(copy("decoder.mid_block.attentions.0.to_out.0.weight"))
    assert rule.sources == ("decoder.mid.attn_1.proj_out.weight",)
    assert rule.source_shape((384, 384)) == (384, 384, 1, 1)
    assert rule.apply(mx.arange(6).reshape(2, 3, 1, 1)).tolist() == [[0, 1, 2], [3, 4, 5]]
    kernel = reading.composed(channels_last("decoder.up_blocks.0.resnets.2.conv1.weight"))
    assert kernel.sources == ("decoder.up.3.block.2.conv1.weight",)
    assert kernel.apply(mx.zeros((4, 3, 2, 1))).shape == (4, 2, 1, 3)


def test_what_is_no_weight_stands_beside_the_model():
    beside = ("tekken_model", "text_encoders.qwen3_8b.logit_scale", "text_encoder.tekken_model")
    assert all(map(naming.is_extra, (*beside, "rotary_emb.inv_freq", "model.layers.3.self_attn.rotary_emb.inv_freq")))
    assert not any(
        map(naming.is_extra, ("double_blocks.0.img_attn.qkv.tekken_model", "img_in.logit_scale", "inv_freq"))
    )
