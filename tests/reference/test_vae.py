"""The autoencoder against diffusers' `AutoencoderKLFlux2`. Images and latents of the reference are channels-first."""

import mlx.core as mx
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from helpers.parity import NETWORK, random_tensor, randomize, relative_error, to_mx, transfer

from flux2_mlx.config import VAEConfig
from flux2_mlx.vae import VAE

FULL = VAEConfig()
SMALL_DECODER = VAEConfig(decoder_block_out_channels=(96, 192, 384, 384))
TINY = VAEConfig((8, 16, 24), None, 1, 4, 4)
TINY_SMALL_DECODER = VAEConfig((8, 16, 24), (4, 8, 12), 2, 4, 4)


def networks(config: VAEConfig, dtype=torch.float32) -> tuple[AutoencoderKLFlux2, VAE]:
    blocks = len(config.block_out_channels)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    reference = randomize(AutoencoderKLFlux2(**config.to_dict(), **kinds), dtype=dtype)
    return reference, transfer(reference, VAE(config), "vae", config)


def channels_last(x: torch.Tensor) -> mx.array:
    return to_mx(x.float()).transpose(0, 2, 3, 1)


def channels_first(x: mx.array) -> mx.array:
    return x.transpose(0, 3, 1, 2)


def image(batch: int, height: int, width: int, dtype=torch.float32) -> torch.Tensor:
    return random_tensor(batch, 3, height, width, dtype=dtype).clamp(-1, 1)


def reference_tokens(reference: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the reference pipeline patchifies, normalises and packs them."""
    mean, std = reference_statistics(reference)
    return Flux2KleinPipeline._pack_latents((Flux2KleinPipeline._patchify_latents(latents) - mean) / std)


def reference_statistics(reference: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance = (x.view(1, -1, 1, 1) for x in (reference.bn.running_mean, reference.bn.running_var))
    return mean, torch.sqrt(variance + reference.config.batch_norm_eps)


@pytest.mark.parametrize("config", [FULL, SMALL_DECODER], ids=["full", "small decoder"])
def test_released_sizes(config):
    reference, ours = networks(config)
    if config is FULL:  # the small decoder has the same encoder
        x = image(1, 32, 48)
        expected = reference.encode(x).latent_dist.mode()
        assert expected.shape == (1, 32, 4, 6)
        assert relative_error(channels_first(ours.encode(channels_last(x))), expected) <= NETWORK
    latents = random_tensor(1, 32, 4, 6)
    expected = reference.decode(latents).sample
    assert expected.shape == (1, 3, 32, 48)
    assert relative_error(channels_first(ours.decode(channels_last(latents))), expected) <= NETWORK


@pytest.mark.parametrize("config", [TINY, TINY_SMALL_DECODER], ids=["equal", "small decoder"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 24, 40), (1, 20, 28), (1, 37, 21)])
def test_encode(config, batch, height, width):
    reference, ours = networks(config)
    x = image(batch, height, width)
    expected = reference.encode(x).latent_dist.mode()
    assert relative_error(channels_first(ours.encode(channels_last(x))), expected) <= NETWORK


@pytest.mark.parametrize("config", [TINY, TINY_SMALL_DECODER], ids=["equal", "small decoder"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 6, 10), (1, 5, 7), (1, 9, 4)])
def test_decode(config, batch, height, width):
    reference, ours = networks(config)
    latents = random_tensor(batch, config.latent_channels, height, width)
    expected = reference.decode(latents).sample
    assert relative_error(channels_first(ours.decode(channels_last(latents))), expected) <= NETWORK


def test_tokens():
    reference, ours = networks(TINY)
    latents = random_tensor(2, 4, 6, 10)
    expected = reference_tokens(reference, latents)
    assert expected.shape == (2, 15, 16)
    assert relative_error(ours.to_tokens(channels_last(latents)), expected) <= 1e-6


def test_latents_from_tokens():
    reference, ours = networks(TINY)
    tokens = random_tensor(2, 15, 16)
    ids = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(2, 1, 3, 5))
    mean, std = reference_statistics(reference)
    latents = Flux2KleinPipeline._unpack_latents_with_ids(tokens, ids) * std + mean
    expected = Flux2KleinPipeline._unpatchify_latents(latents)
    assert relative_error(channels_first(ours.from_tokens(to_mx(tokens), 3, 5)), expected) <= 1e-6


def test_bfloat16():
    reference, ours = networks(TINY, torch.bfloat16)
    ours.set_dtype(mx.bfloat16)
    x = image(1, 40, 56, torch.bfloat16)
    latents = random_tensor(1, 4, 10, 14, dtype=torch.bfloat16)
    exact = (
        reference.encode(x).latent_dist.mode(),
        reference_tokens(reference, latents),
        reference.decode(latents).sample,
    )
    reference, x, latents = reference.bfloat16(), x.bfloat16(), latents.bfloat16()
    theirs = (
        reference.encode(x).latent_dist.mode(),
        reference_tokens(reference, latents),
        reference.decode(latents).sample,
    )
    x, latents = (channels_last(a).astype(mx.bfloat16) for a in (x, latents))
    got = channels_first(ours.encode(x)), ours.to_tokens(latents), channels_first(ours.decode(latents))
    for mine, torchs, right in zip(got, theirs, exact, strict=True):
        assert mine.dtype == mx.bfloat16
        assert relative_error(mine, right) <= 1.5 * relative_error(torchs, right)  # measured: 1.25, 1.00, 1.29
