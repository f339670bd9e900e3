"""Text encoders that lie alone: what their own config or GGUF header says is obeyed, or refused."""

import json

import pytest
from flux2_mlx.convert import assembled
from helpers.cli_runner import done
from helpers.headers import write, write_gguf
from helpers.listings import listing, renamed, text_only
from helpers.official_configs import mistral3, qwen3

from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import CheckpointError
from flux2_mlx.store import demo_folder

pytestmark = pytest.mark.usefixtures("folder")
FOUR, DEV = VARIANTS["klein-4b"], VARIANTS["dev"]
DEMO = demo_folder()
LLAMA = {
    "model.embed_tokens.": "token_embd.",
    "model.layers.": "blk.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "self_attn.q_norm.": "attn_q_norm.",
    "self_attn.k_norm.": "attn_k_norm.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
}


def encoder(folder, config, names="qwen3-4b"):
    place = write(folder / "encoder" / "model.safetensors", listing(names)).parent
    (place / "config.json").write_text(json.dumps(config))
    return place


def in_gguf(folder, metadata, kind="qwen3"):
    metadata = {f"{kind}.{name}" if "general" not in name else name: x for name, x in metadata.items()}
    infos = renamed(listing("qwen3-4b"), LLAMA.items())
    return write_gguf(folder / "x.gguf", infos, "Q8_0", metadata={"general.architecture": kind} | metadata)


def text_of(place, row=FOUR):
    """The geometry of the text encoder at `place`."""
    given = {"text_encoder": place, "tokenizer": DEMO}
    return assembled(place, given, row.name, text_only=True).configs["text_encoder"]


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 5e6, "rope_parameters": None}, {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}],
)
def test_the_base_of_a_config_is_kept(change, is_file, folder):
    place = encoder(folder, qwen3(FOUR.text) | change)
    assert text_of(place / "model.safetensors" if is_file else place).rope_theta == 5e6


def test_a_config_in_few_words_leaves_the_rest_as_it_is(folder):
    assert text_of(encoder(folder, {"model_type": "qwen3"})) == text_of(encoder(folder, {}))
    assert text_of(encoder(folder, {"model_type": "qwen3", "rms_norm_eps": 1e-5})).rms_norm_eps == 1e-5
    assert text_of(encoder(folder, qwen3(FOUR.text))) == text_of(encoder(folder, {}))


def test_mistral_with_and_without_its_tower(folder):
    config = mistral3(DEV.text, DEV.vision)
    config["text_config"]["rope_parameters"] = {"rope_theta": 1e8, "rope_type": "default"}
    place = encoder(folder, config, "mistral3-24b")
    made = assembled(place, {"tokenizer": DEMO}, "dev", text_only=True).configs
    assert (made["text_encoder"].rope_theta, made["vision"]) == (1e8, DEV.vision)
    assert made["language_model"] == made["text_encoder"]
    alone = write(folder / "alone" / "model.safetensors", text_only(listing("mistral3-24b"))).parent
    (alone / "config.json").write_text(json.dumps({"model_type": "mistral", "rope_theta": 1e8}))
    assert text_of(alone, DEV).rope_theta == 1e8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen3_vl_text"},
            "by its config it is Qwen3-VL, which FLUX.2 does not read prompts with; klein",
        ),
        ({"model_type": "mistral"}, "by its config it is 'mistral', which FLUX.2 does not read"),
        ({"attention_bias": True}, "attention_bias is True, FLUX.2 has False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn', FLUX.2 has 'default'"),
        ({"num_attention_heads": 64}, "num_attention_heads is 64 by its config and 32 by its tensors; give"),
        ({"layer_types": ["sliding_attention"] * 36}, "layer_types is "),
    ],
)
def test_what_can_not_be_done_is_refused(change, message, folder):
    place = encoder(folder, qwen3(FOUR.text) | change)
    with pytest.raises(CheckpointError) as caught:
        text_of(place)
    assert str(caught.value).startswith(f"{place}: {message}")
    assert f"note       {place}: {message}"[:60] in done("info", place).stdout.replace("the text encoder:", f"{place}:")


@pytest.mark.parametrize("base", ["5", [1], -1, 10**400])
def test_a_base_that_is_none_is_refused(base, folder):
    place = encoder(folder, qwen3(FOUR.text) | {"rope_parameters": {"rope_theta": base}})
    with pytest.raises(CheckpointError, match="encoder describes no text_encoder"):
        text_of(place)


def test_a_gguf_file_says_it_in_its_header(folder):
    said = {"rope.freq_base": 5e6, "attention.layer_norm_rms_epsilon": 1e-6, "attention.head_count": 32.0}
    plain = text_of(in_gguf(folder, {"rope.freq_base": 1e6}))
    made = text_of(in_gguf(folder, said | {"embedding_length": 2560.0, "rope.scaling.type": "none"}))
    assert (made.rope_theta, made.rms_norm_eps, plain.rope_theta) == (5e6, 1e-6, 1e6)
    (folder / "config.json").write_text(json.dumps(qwen3(FOUR.text)))  # of other files in the folder
    assert text_of(in_gguf(folder, said)).rope_theta == 5e6


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        ("qwen3vl", {"rope.freq_base": 5e6}, "by its config it is Qwen3-VL"),
        ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope_scaling.rope_type is 'yarn'"),
        ("qwen3", {"rope.scaling.factor": 4.0}, "rope_scaling.rope_type is 'linear'"),
        ("qwen3", {"attention.head_count": 64.0}, "num_attention_heads is 64.0 by its config and 32"),
        ("qwen3", {"rope.freq_base": "a lot"}, "text_encoder"),
    ],
)
def test_a_header_of_what_can_not_be_done_is_refused(kind, said, message, folder):
    place = in_gguf(folder, said, kind)
    with pytest.raises(CheckpointError, match=message):
        text_of(place)
    first = done("info", place).stdout.splitlines()[0]
    assert first == f"{place}: text encoder of another model"


@pytest.mark.parametrize("start", ["model.language_model.", "language_model.model."])
def test_qwen3_vl_is_known_by_its_names(start, folder):
    path = write(folder / "x.safetensors", renamed(listing("qwen3-4b"), [("model.", start)]))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is Qwen3-VL; FLUX\.2 reads prompts with Qwen3"):
        text_of(path)
    assert done("info", path).stdout.startswith(f"{path}: Qwen3-VL\n")
