"""The original naming becomes the canonical one as the converters of diffusers and transformers have it."""

import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from flux2_mlx.convert import naming
from helpers.listings import listing
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from flux2_mlx.weights import TensorInfo


def random(names, shape_of):
    """Small random tensors by name."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape_of(name), generator=generator) for name in names}


def canonical(tensors):
    """All canonical tensors that `tensors` make."""
    infos = {name: TensorInfo("F32", tuple(x.shape)) for name, x in tensors.items()}
    (reading,) = naming.read(infos, "x").values()
    assert reading.unknown == []
    made = {}
    for name, info in reading.infos.items():
        rule = reading.rule(name)
        made[name] = np.array(rule.apply(*(mx.array(tensors[source].numpy()) for source in rule.sources)))
        assert made[name].shape == info.shape
    return made


def assert_same(made, expected):
    assert made.keys() == expected.keys()
    assert [name for name, x in expected.items() if not np.array_equal(made[name], x.numpy())] == []


@pytest.mark.parametrize("variant", ["dev", "klein-4b"])
def test_transformers_of_diffusers(variant):
    original = random(listing(f"transformer_{variant}_bfl"), lambda name: (6,) if name.endswith("scale") else (6, 4))
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    assert_same(canonical(theirs), original)
    assert_same(canonical(original), original)


def test_vaes_of_the_original_release():
    """The converter is that of Stable Diffusion, which has neither normalization nor nested convolutions."""
    names = [name for name in listing("ae_bfl") if not name.startswith("bn.")]
    matrices = [name for name in names if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)]
    original = random(names, lambda name: (4, 4, 1, 1) if name in matrices else (5,))
    flat = {name.replace("encoder.quant", "quant").replace("decoder.post", "post"): x for name, x in original.items()}
    levels = ["level"] * 4
    theirs = convert_ldm_vae_checkpoint(flat, {"down_block_types": levels, "up_block_types": levels})
    for name, tensor in theirs.items():
        if ".attentions.0.to_" in name and name.endswith("weight"):
            theirs[name] = tensor.reshape(4, 4)
    assert_same(canonical(original), theirs)


@pytest.mark.parametrize("heads", [2, 8])
def test_heads_of_llama_cpp(heads):
    stored = np.random.default_rng(5).standard_normal((heads * 128, 3)).astype(np.float32)
    infos = {"blk.0.attn_q.weight": TensorInfo("F32", stored.shape)}
    rule = naming.read(infos, "x")["text_encoder"].rule("model.layers.0.self_attn.q_proj.weight")
    theirs = LlamaTensorProcessor()._reverse_permute_weights(stored, heads, heads)
    assert np.array_equal(np.array(rule.apply(mx.array(stored))), theirs)
