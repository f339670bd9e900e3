"""Which other model an adapter is for, by the names of its modules."""

import re
from collections.abc import Iterable

# The first that fits one of the names, which have underscores for dots, counts.
_OTHERS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("Chroma", r"distilled_guidance_layer_"),
        ("Stable Diffusion XL", r"(?:te2|text_encoder_2)_|(?:input|down)_blocks_\d+_.*transformer_blocks_[2-9]"),
        ("Stable Diffusion", r"(?:input|output|middle|down|mid|up)_blocks?_"),
        ("Stable Diffusion 3", r"joint_blocks_\d"),
        ("FLUX.1", r"double_blocks_\d+_(?:processor_|(?:img|txt)_mod_lin$)|single_blocks_\d+_modulation_lin$"),
        ("FLUX.1", r"single_transformer_blocks_\d+_(?:norm_linear|proj_mlp|proj_out|attn_to_[qkv])$"),
        ("HunyuanVideo", r"double_blocks_\d+_(?:img|txt)_(?:mod_linear|mlp_fc\d|attn_qkv_)|refiner_blocks_\d"),
        ("Qwen-Image", r"transformer_blocks_\d+_(?:img|txt)_(?:mlp_net|mod_1)"),
        ("LTX-Video or PixArt", r"transformer_blocks_\d+_attn[12]_"),
        ("FLUX.1 or Stable Diffusion 3", r"transformer_blocks_\d+_(?:norm1(?:_context)?_linear|ff(?:_context)?_net_)"),
        ("Anima", r"llm_adapter_"),
        ("Z-Image or Lumina 2", r"(?:noise|context)_refiner_|layers_\d+_(?:attention_|feed_forward_w|adaLN)"),
        ("Wan", r"(?:^|_)blocks_\d+_(?:self_attn_[qkvo]|cross_attn_.+|ffn_[02])$"),
        ("a model that reads prompts with CLIP or T5", r"text_model_encoder_layers_|encoder_block_\d+_layer_"),
    )
)


def other_model(modules: Iterable[str]) -> str | None:
    """The model that modules of these names are of, or None."""
    names = [name.replace(".", "_") for name in modules]
    return next((other for other, pattern in _OTHERS if any(map(pattern.search, names))), None)
