"""Adapters that diffusers, peft and LyCORIS wrote, compared with what these make of a layer's inputs."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.lora import AdapterFile, read_adapter

from flux2_mlx.adapters import Decomposed, Placed
from flux2_mlx.config import TransformerConfig
from flux2_mlx.weights import Files

GOLDEN = Path(__file__).parent / "golden"
SMALL = TransformerConfig(1, 1, 2, 24, 8, 8, 16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False)
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# By our names of layers and the row that a change begins at, the trainer's.
DIFFUSERS = {
    ("double_blocks.0.img_attn.qkv", 0): f"{BLOCK}.attn.to_q",
    ("double_blocks.0.img_attn.qkv", 32): f"{BLOCK}.attn.to_v",
    ("double_blocks.0.img_attn.proj", 0): f"{BLOCK}.attn.to_out.0",
    ("double_blocks.0.img_mlp.0", 0): f"{BLOCK}.ff.linear_in",
    ("single_blocks.0.linear1", 0): f"{SINGLE}.attn.to_qkv_mlp_proj",
    ("final_layer.adaLN_modulation.1", 0): "norm_out.linear",
}
PEFT = {
    ("double_blocks.0.txt_attn.qkv", 16): f"{BLOCK}.attn.add_k_proj",
    ("double_blocks.0.img_mlp.0", 0): f"{BLOCK}.ff.linear_in",
    ("double_blocks.0.txt_mlp.0", 0): f"{BLOCK}.ff_context.linear_in",
    ("img_in", 0): "x_embedder",
}
LOKR = {
    ("double_blocks.0.txt_attn.qkv", 32): f"{BLOCK}.attn.add_v_proj",
    ("double_blocks.0.txt_attn.proj", 0): f"{BLOCK}.attn.to_add_out",
    ("double_blocks.0.img_mlp.2", 0): f"{BLOCK}.ff.linear_out",
    ("double_blocks.0.txt_mlp.2", 0): f"{BLOCK}.ff_context.linear_out",
}
LYCORIS = {
    (name, 0): name.replace(".", "_")
    for block, layers in {
        "double_blocks.0": ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "txt_attn.qkv", "txt_attn.proj", "txt_mlp.0"),
        "single_blocks.0": ("linear1", "linear2"),
    }.items()
    for name in (f"{block}.{layer}" for layer in layers)
}


def opened(name: str, tmp_path: Path) -> AdapterFile:
    """A golden file, with the config beside it that it was saved with."""
    config = Files([GOLDEN / "lora_expected.safetensors"]).metadata.get(name)
    if config is None:
        return read_adapter(GOLDEN / f"lora_{name}.safetensors")
    shutil.copy(GOLDEN / f"lora_{name}.safetensors", tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    return read_adapter(tmp_path)


def output(placed: Placed) -> np.ndarray:
    """By what a change of the weight sin(0), sin(1), … moves what a layer gives for the inputs cos(0), cos(1), …"""
    outputs, inputs = placed.change.shape
    base = mx.sin(mx.arange(outputs * inputs, dtype=mx.float32)).reshape(outputs, inputs)
    is_dora = isinstance(placed.change, Decomposed)
    weight = placed.change.weight(base) if is_dora else placed.change.weight()
    return np.array(mx.cos(mx.arange(2 * inputs, dtype=mx.float32)).reshape(2, inputs) @ weight.T)


@pytest.mark.parametrize(
    ("name", "layers"), [("diffusers", DIFFUSERS), ("peft", PEFT), ("lokr", LOKR), ("lycoris", LYCORIS)]
)
def test_what_trainers_write(name, layers, tmp_path):
    found, configs = opened(name, tmp_path), {"transformer": SMALL}
    found.check(configs, "small")
    assert not found.unknown
    assert not found.notes(configs, "small")
    expected = dict(mx.load(str(GOLDEN / "lora_expected.safetensors")))
    loaded = found.load(configs, name).layers["transformer"]
    pairs = {(layer, one.rows.start if one.rows else 0): one for layer, placed in loaded.items() for one in placed}
    assert pairs.keys() == layers.keys()
    for key, placed in pairs.items():
        ours, theirs = output(placed), np.array(expected[f"{name}.{layers[key]}"])
        if "adaLN" in key[0]:
            theirs = np.concatenate([theirs[:, 16:], theirs[:, :16]], axis=1)
        assert np.linalg.norm(ours - theirs) <= 2e-5 * np.linalg.norm(theirs), key


def test_what_headers_of_trainers_tell(tmp_path):
    diffusers, peft = opened("diffusers", tmp_path), opened("peft", tmp_path)
    assert (diffusers.said.trainer, diffusers.naming, diffusers.kinds) == ("diffusers", "diffusers", ("LoRA",))
    assert (peft.said.trainer, peft.kinds, peft.ranks) == ("PEFT", ("LoRA", "DoRA"), (2,))
    lycoris = opened("lycoris", tmp_path)
    assert (lycoris.said.trainer, lycoris.naming) == ("LyCORIS", "kohya")
    assert lycoris.kinds == ("LoKr", "LoHa", "LoRA", "full difference", "DoRA")
