"""Sizes of the demonstration model and constructors of its reference (PyTorch) parts."""

from __future__ import annotations

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

IMAGE_SIDE = 128
TEXT_LENGTH = 48
TEXT_LAYERS = (1, 2, 3)
STEPS = 8
LATENT_CHANNELS = 8
TOKEN_CHANNELS = 4 * LATENT_CHANNELS
TOKENS_PER_SIDE = IMAGE_SIDE // 16
TEXT_WIDTH = 128
TEXT_LAYER_COUNT = 4

DEPTH = {"num_layers": 2, "num_single_layers": 4}
HEADS = 4
HEAD_DIM = 32


def build_vae() -> AutoencoderKLFlux2:
    """An untrained autoencoder: (B, 3, H, W) in [-1, 1] to (B, 8, H / 8, W / 8) and back."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIDE,
        batch_norm_eps=1e-4,
    )


def build_text_encoder(vocabulary: int, pad_id: int, end_id: int) -> Qwen3ForCausalLM:
    """An untrained language model whose layers 1 to 3 feed the transformer.

    The fourth layer is there because the last hidden state the library returns has the final norm applied to it.
    """
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYER_COUNT,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=pad_id,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    return Qwen3ForCausalLM(config)


def build_transformer() -> Flux2Transformer2DModel:
    """An untrained velocity model over 32-channel tokens."""
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=TOKEN_CHANNELS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=len(TEXT_LAYERS) * TEXT_WIDTH,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(HEAD_DIM // 4,) * 4,
        rope_theta=2000,
        guidance_embeds=False,
        **DEPTH,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The released models' scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )
