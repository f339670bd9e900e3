"""What we write for diffusers, loaded by its `load_lora_weights`: its network then gives what ours gives with the file
that it was made from."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders import Flux2LoraLoaderMixin
from flux2_mlx.convert.lora import read_adapter, save_adapter
from flux2_mlx.convert.lora.places import layer_shapes
from helpers.adapters import factors, lora, save
from helpers.parity import NETWORK, random_tensor, randomize, relative_error, to_mx, transfer

from flux2_mlx.branches import AtWork, Branches
from flux2_mlx.config import TransformerConfig
from flux2_mlx.layers import adapted
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids

KLEIN = TransformerConfig(1, 1, 2, 24, 16, 16, axes_dims_rope=(2, 6, 4, 4), guidance_embeds=False)
TEXT, HEIGHT, WIDTH = 5, 2, 3


class Pipeline(Flux2LoraLoaderMixin):
    """As much of a pipeline as adapters are loaded into."""

    components, hf_device_map = {}, None

    def __init__(self, transformer: Flux2Transformer2DModel):
        self.transformer = transformer


def _lora(name, outputs, inputs, seed):
    return lora(name, outputs, inputs, 2 + seed % 3, seed=seed) | factors(name, seed, alpha=())


def _dora(name, outputs, inputs, seed):
    lengths = {f"{name}.dora_scale": np.linspace(0.5, 1.5, outputs, dtype=np.float32)[:, None]}
    return lora(name, outputs, inputs, 2, seed=seed) | lengths


def _loha(name, outputs, inputs, seed):
    pair = {f"hada_w{n}_{half}": shape for n in (1, 2) for half, shape in (("a", (outputs, 2)), ("b", (2, inputs)))}
    return factors(name, seed, **pair)


def _lokr(name, outputs, inputs, seed):
    return factors(name, seed, lokr_w1=(4, 2), lokr_w2_a=(outputs // 4, 2), lokr_w2_b=(2, inputs // 2))


def _difference(name, outputs, inputs, seed):
    return factors(name, seed, diff=(outputs, inputs), diff_b=(outputs,))


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights")  # of layers without a bias of their own
@pytest.mark.parametrize("form", [_lora, _dora, _loha, _lokr, _difference])
def test_diffusers_loads_what_we_write(form, tmp_path):
    reference = randomize(Flux2Transformer2DModel(**KLEIN.to_dict()))
    ours = transfer(reference, Flux2Transformer(KLEIN), "transformer", KLEIN)
    tensors = {}
    for seed, (layer, shape) in enumerate(layer_shapes("transformer", KLEIN).items()):
        tensors |= form(f"diffusion_model.{layer}", *shape, seed)
    shrunk = {name: x / 8 if "dora" not in name else x for name, x in tensors.items()}
    found = read_adapter(save(tmp_path / "x.safetensors", shrunk))
    plain = _velocity(ours)
    adapter = found.load({"transformer": KLEIN}, "x").cast(lambda network: mx.float32)
    changed = _velocity(adapted(ours, Branches.of("transformer", [AtWork(adapter)])))
    assert relative_error(changed, plain) > 1e-3

    path = save_adapter(found, tmp_path / "diffusers")
    Pipeline(reference).load_lora_weights(str(path))
    states, tokens = random_tensor(1, TEXT, KLEIN.joint_attention_dim, seed=2), _tokens()
    ids = [torch.from_numpy(np.array(x)) for x in (image_ids(HEIGHT, WIDTH), text_ids(TEXT))]
    expected = reference(tokens, states, torch.tensor([0.77]), *ids, None).sample
    assert relative_error(changed, expected) <= NETWORK


def _tokens():
    return random_tensor(1, HEIGHT * WIDTH, KLEIN.in_channels, seed=1)


def _velocity(network: Flux2Transformer) -> mx.array:
    states = network.txt_in(to_mx(random_tensor(1, TEXT, KLEIN.joint_attention_dim, seed=2)))
    rope = rope_table(np.concatenate([text_ids(TEXT), image_ids(HEIGHT, WIDTH)]), KLEIN)
    return network(to_mx(_tokens()), states, mx.array([0.77]), rope, None)
