"""Configs as diffusers and transformers save them beside the weights of FLUX.2's networks."""

from typing import Any

from flux2_mlx.config import TextConfig, TransformerConfig, VAEConfig, VisionConfig

_DIFFUSERS, _TRANSFORMERS = {"_diffusers_version": "0.42.1"}, {"transformers_version": "5.23.0"}
_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_TEXT = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "pad_token_id": None}
_TEXT |= {"sliding_window": None, "use_cache": True}


def transformer_2d(config: TransformerConfig) -> dict[str, Any]:
    """Of `Flux2Transformer2DModel`."""
    fixed = {"_class_name": "Flux2Transformer2DModel", "out_channels": None, "patch_size": 1}
    return fixed | _DIFFUSERS | config.to_dict()


def autoencoder(config: VAEConfig) -> dict[str, Any]:
    """Of `AutoencoderKLFlux2`."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKLFlux2",
        **_DIFFUSERS,
        "act_fn": "silu",
        "batch_norm_momentum": 0.1,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "mid_block_add_attention": True,
        "out_channels": 3,
        "sample_size": 1024,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
        **config.to_dict(),
    }


def qwen3(config: TextConfig) -> dict[str, Any]:
    """Of `Qwen3ForCausalLM`."""
    layers = config.num_hidden_layers + config.num_later_layers
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": None,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 1024,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        **_TEXT,
        **_TRANSFORMERS,
        **_geometry(config),
    }


def mistral3(text: TextConfig, vision: VisionConfig) -> dict[str, Any]:
    """Of `Mistral3ForConditionalGeneration`."""
    text_config = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 131_072,
        "model_type": "mistral",
        "num_hidden_layers": text.num_hidden_layers + text.num_later_layers,
        "tie_word_embeddings": text.tie_word_embeddings,
        **_TEXT,
        **_geometry(text),
    }
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    vision_config = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "pixtral",
        "num_channels": 3,
        "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "axial"},
        **{name: getattr(vision, name) for name in (*sizes, "head_dim")},
    }
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": vision.spatial_merge_size,
        "text_config": text_config,
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_config": vision_config,
        "vision_feature_layer": -1,
        **_TRANSFORMERS,
    }


def _geometry(config: TextConfig) -> dict[str, Any]:
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    sizes = {name: getattr(config, name) for name in (*_SIZES, "rms_norm_eps")}
    return sizes | {"rope_parameters": rope}


def scheduler(settings: dict[str, Any]) -> dict[str, Any]:
    """Of `FlowMatchEulerDiscreteScheduler`."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **_DIFFUSERS,
        "base_image_seq_len": 256,
        "invert_sigmas": False,
        "max_image_seq_len": 4096,
        "num_train_timesteps": 1000,
        "shift_terminal": None,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
        **settings,
    }


def pipeline(kind: str) -> dict[str, Any]:
    """`model_index.json` of a pipeline of this class; of dev as short as a file may be."""
    if kind != "Flux2KleinPipeline":
        return {"_class_name": kind}
    return {
        "_class_name": kind,
        **_DIFFUSERS,
        "is_distilled": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
