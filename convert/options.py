"""What the reference makes of each key of its configs: one table per network.

Sources: the signatures and code of diffusers' `Flux2Transformer2DModel`, `AutoencoderKLFlux2`, Flux2 pipelines and
`FlowMatchEulerDiscreteScheduler`, and of transformers' `Qwen3Config`, `Mistral3Config`, `MistralConfig` and
`PixtralVisionConfig`.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2_mlx.config import TransformerConfig, VAEConfig
from flux2_mlx.errors import CheckpointError

_OFF = (False, None)
_ONE = (1, None)
_ROPE_THETA = 1e4  # of every transformers config that states none


@dataclass(frozen=True)
class Options:
    """The keys of one section of a config.

    `read` are those that become our geometry, `fixed` those that change the result, with the values that do what
    FLUX.2 does. `harmless` ones change no image. `defaults` are what the reference takes for keys that are left out,
    where that is not what ours or the first of `fixed` says.
    """

    read: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]
    harmless: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _fields(config: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(config))


# Kept by all configs of transformers: training, saving, and how tokens are chosen, which is ours to say.
_COMMON = _keys("""
    add_cross_attention architectures attention_dropout attn_implementation bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_composition is_decoder is_encoder_decoder
    label2id length_penalty max_length max_position_embeddings min_length name_or_path no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """)
# How a network's weights are stored, which decides what they are.
_STORED = {"quantization_config": (None,), "compression_config": (None,), "quantization": (None,)}
# Of the decoders of transformers; those below that Qwen3 and Mistral do not know are other models' own.
_DECODER = _STORED | {
    "hidden_act": ("silu", "swish"),
    "attention_bias": _OFF,
    "mlp_bias": _OFF,
    "is_causal": (None, True),
    "partial_rotary_factor": _ONE,
    "per_layer_config": (None, {}),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "logits_scaling": _ONE,
    "logit_scale": _ONE,
}
_ROPE = frozenset({"rope_theta", "rope_parameters", "rope_scaling"})
_TEXT = _ROPE | _keys("""
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim rms_norm_eps layer_types tie_last_hidden_states
    """)

TRANSFORMER = Options(
    _fields(TransformerConfig) | {"out_channels"},
    {"_class_name": ("Flux2Transformer2DModel",), "patch_size": (1,), **_STORED},
    frozenset({"dtype", "torch_dtype"}),
    {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360},
)
VAE = Options(
    _fields(VAEConfig) | {"down_block_types", "up_block_types"},
    {
        "_class_name": ("AutoencoderKLFlux2",),
        "in_channels": (3,),
        "out_channels": (3,),
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
        **_STORED,
    },
    # Latents are normalised with the statistics in the weights alone, and sizes matter only to diffusers' tiles.
    _keys("""
        batch_norm_momentum dtype force_upcast latents_mean latents_std sample_size scaling_factor shift_factor
        torch_dtype
        """),
)
SCHEDULER = Options(
    frozenset(),
    {
        "_class_name": ("FlowMatchEulerDiscreteScheduler",),
        "num_train_timesteps": (1000,),
        "use_dynamic_shifting": (True,),
        "time_shift_type": ("exponential",),
        "shift_terminal": (None, 0),
        "invert_sigmas": _OFF,
        "stochastic_sampling": _OFF,
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "use_flow_sigmas": _OFF,  # asked for by the pipelines, of whatever the file says
    },
    # The pipelines compute the shift themselves, so lines through other points are never read, nor is a fixed shift.
    # The ends of the noise levels are read by the three forms above.
    _keys("base_image_seq_len base_shift max_image_seq_len max_shift shift sigma_max sigma_min"),
    {"use_dynamic_shifting": False},
)
QWEN3 = Options(
    _TEXT | {"tie_word_embeddings"},
    _DECODER | {"use_sliding_window": _OFF},
    _COMMON | {"sliding_window", "max_window_layers"},
    {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
    },
)
MISTRAL = Options(
    _TEXT - {"model_type"},
    # A window that a file does not state is one of 4,096 tokens, longer than any prompt.
    _DECODER | {"model_type": ("mistral",), "sliding_window": (None,)},
    _COMMON | {"tie_word_embeddings"},
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
    },
)
PIXTRAL = Options(
    _ROPE | _keys("hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim patch_size image_size"),
    _STORED
    | {
        "model_type": ("pixtral",),
        "hidden_act": ("silu", "swish"),
        "num_channels": (3,),
        "attention_bias": _OFF,
        "mlp_bias": _OFF,
        "partial_rotary_factor": _ONE,
        "per_layer_config": (None, {}),
    },
    _COMMON | {"tie_last_hidden_states", "tie_word_embeddings", "vocab_size"},
    {"hidden_act": "gelu", "image_size": 1024, "patch_size": 16},
)
MISTRAL3 = Options(
    frozenset({"model_type", "text_config", "vision_config", "spatial_merge_size", "tie_word_embeddings"}),
    _STORED
    | {
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": _OFF,
        "vision_feature_layer": (-1, [-1]),
        "image_token_index": (10,),
        "image_token_id": (10,),
        "per_layer_config": (None, {}),
    },
    _COMMON | {"image_seq_length", "tie_last_hidden_states", "vision_feature_select_strategy"},
)


def checked(
    values: dict[str, Any], options: Options, path: Path, notes: list[str], section: str = ""
) -> dict[str, Any]:
    """`values` of a section (`text_config.`) of `path`, with what the reference takes for keys that are left out.

    A key that neither we nor the reference know is added to `notes`; the reference logs it.

    Raises:
        CheckpointError: a key asks for what is not implemented.
    """
    given = values.keys()
    values = {**options.defaults, **values}
    for key, allowed in options.fixed.items():
        if values.get(key, allowed[0]) not in allowed:
            left_out = "" if key in given else ", which is left out,"
            refuse(f"{section}{key}{left_out}", values[key], allowed[0], path)
    known = options.read | options.harmless | options.fixed.keys()
    unknown = [key for key, value in values.items() if key not in known and key[:1] != "_" and value is not None]
    if unknown:
        names = ", ".join(reprlib.repr(f"{section}{key}") for key in unknown[:8])
        notes.append(f"{path}: unknown keys are ignored, as the reference does: {names}")
    return values


def refuse(key: str, value: Any, ours: Any, path: Path) -> None:
    """Raise the CheckpointError for a `key` that has another value than `ours`."""
    raise CheckpointError(
        f"{path}: {key} is {reprlib.repr(value)}, FLUX.2 has {ours!r}, and nothing else is implemented"
    )


def check_alike(
    values: dict[str, Any], key: str, wanted: str, count: int | None, path: Path, section: str = ""
) -> None:
    """CheckpointError if the list `key`, where there is one, holds anything but `wanted`, `count` times if given."""
    found = values.get(key)
    if found is None:
        return
    if not isinstance(found, list) or any(kind != wanted for kind in found) or count not in (None, len(found)):
        times = "" if count is None else f" {count} times"
        raise CheckpointError(f"{path}: {section}{key} is {reprlib.repr(found)}, FLUX.2 has {wanted!r}{times}")


def rope_theta(values: dict[str, Any], kinds: tuple[str, ...], path: Path, section: str) -> Any:
    """The rotation's base; CheckpointError if angles are scaled or only part of a head is turned.

    transformers nests it since version 5, and takes an older file's `rope_scaling` in place of `rope_parameters`.
    """
    nested: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise CheckpointError(f"{path}: {section}{name} is {reprlib.repr(rope)}, not those of one rotation")
        kind = rope.get("rope_type", rope.get("type", kinds[0]))
        if kind not in kinds:
            refuse(f"{section}{name}.rope_type", kind, kinds[0], path)
        if rope.get("partial_rotary_factor") not in (None, 1):
            refuse(f"{section}{name}.partial_rotary_factor", rope["partial_rotary_factor"], 1, path)
        nested = rope or nested
    return nested.get("rope_theta", values.get("rope_theta", _ROPE_THETA))
