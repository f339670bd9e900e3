"""TAEF2 against its definition in PyTorch, which is written out here after `Decoder` of madebyollin's `taesd.py`."""

import mlx.core as mx
import pytest
import torch
from flux2_mlx.convert import read_decoder
from helpers.parity import BLOCK, random_tensor, randomize, relative_error, to_mx
from safetensors.torch import save_file
from torch import nn

from flux2_mlx.config import VAEConfig
from flux2_mlx.errors import CheckpointError
from flux2_mlx.loading import fill
from flux2_mlx.vae import TinyDecoder, TinyVAEConfig, VAECost, autoencoder


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, pooled: bool):
        super().__init__()
        convs = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*convs[:-1])
        if pooled:
            widen, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(widen, nn.GroupNorm(4, 256), nn.ReLU(), narrow)

    def forward(self, x):
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return torch.relu(self.conv(x) + x)


def reference_decoder(channels: int) -> nn.Sequential:
    levels = []
    for level in range(3):
        levels += [Block(level == 0) for _ in range(3)]
        levels += [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
    first, last = nn.Conv2d(channels, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)
    return randomize(nn.Sequential(Clamp(), first, nn.ReLU(), *levels, Block(False), last), dtype=torch.bfloat16)


def saved(reference: nn.Sequential, path, spelled=lambda name: name):
    save_file({spelled(name): x.half() for name, x in reference.state_dict().items()}, path)
    return path


def whole_model(name: str) -> str:
    """The name of a layer as `taef2.safetensors` has it, which holds both halves in the naming of diffusers."""
    number, _, rest = name.partition(".")
    return f"decoder.layers.{int(number) - 1}.{rest}"


@pytest.mark.parametrize("spelled", [lambda name: name, whole_model], ids=["decoder alone", "whole model"])
@pytest.mark.parametrize("strip_bytes", [2**28, 2**18], ids=["whole", "in strips"])
def test_images_of_normalised_latents(tmp_path, spelled, strip_bytes):
    reference = reference_decoder(32)
    decoder = read_decoder(saved(reference, tmp_path / "taef2.safetensors", spelled), "taef2")
    assert decoder.is_tiny
    tiny = TinyDecoder(32)
    fill(tiny, decoder.layers)
    latents = random_tensor(2, 32, 6, 10)
    expected = reference(latents)
    assert expected.shape == (2, 3, 48, 80)
    ours = tiny.decode(to_mx(latents).transpose(0, 2, 3, 1), strip_bytes)
    assert relative_error(ours.transpose(0, 3, 1, 2), expected) <= BLOCK


def test_images_of_the_tokens_of_a_model(tmp_path):
    """From tokens by way of un-normalised latents, as a pipeline decodes; the reference takes the very tokens."""
    reference = reference_decoder(8)
    decoder = read_decoder(saved(reference, tmp_path / "tiny.safetensors"), "tiny")
    vae = autoencoder(decoder.config)
    fill(vae.decoder, decoder.layers)
    generator = torch.Generator().manual_seed(1)
    vae.bn.running_mean = to_mx(torch.randn(32, generator=generator))
    vae.bn.running_var = to_mx(torch.rand(32, generator=generator) * 4 + 0.5)
    tokens = random_tensor(1, 15, 32)
    latents = tokens.reshape(1, 3, 5, 8, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 8, 6, 10)
    expected = 2 * reference(latents) - 1
    ours = vae.decode(vae.from_tokens(to_mx(tokens), 3, 5))
    assert relative_error(ours.transpose(0, 3, 1, 2), expected) <= BLOCK


def test_a_file_that_lacks_a_layer_is_refused(tmp_path):
    reference = reference_decoder(32)
    path = saved(reference, tmp_path / "taef2.safetensors", lambda name: name.replace("18.conv.0", "20.conv.0"))
    with pytest.raises(CheckpointError, match=r"not TAEF2's decoder: missing 18\.conv\.0"):
        read_decoder(path, "taef2")


def test_it_takes_less_memory_than_a_whole_decoder():
    tiny, whole = TinyVAEConfig(), VAEConfig()
    costs = [VAECost(config, mx.bfloat16).decoding(1024, 1024) for config in (tiny, whole)]
    assert costs[0] < costs[1] / 2
