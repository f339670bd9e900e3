"""The dialects that sources name their tensors in, and how tensors of our own naming are made of them.

Each part of a model has one canonical naming, which `rules` and the geometry read: the transformer's is that of the
original release, the VAE's that of diffusers, the text encoder's that of Qwen3 with Mistral's vision parts on top. No
payload is looked at here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .rules import Rule, Shape, copy, join_rows, swap_halves

# A block's number. Other numbers, such as the 0 of `img_mlp.0`, are part of a name.
_NUMBER = re.compile(
    r"(?:^|(?<=\.))(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks|layers|blk|down|up|block|"
    r"down_blocks|up_blocks|(?<!mid_block\.)resnets)\.(0|[1-9][0-9]{0,2})(?=\.)"
)


def matrix(source: str) -> Rule:
    """A convolution of 1×1 pixels as the matrix that it is."""
    return Rule((source,), lambda x: x.reshape(x.shape[:2]), lambda shape: (*shape, 1, 1))


def channels_first(source: str) -> Rule:
    """A convolution of MLX, out·height·width·in, as one of PyTorch."""
    return Rule((source,), lambda x: x.transpose(0, 3, 1, 2), lambda shape: (shape[0], *shape[2:], shape[1]))


def unpermute(source: str, head_dim: int) -> Rule:
    """Undo llama.cpp's order of query or key rows, which puts the two rows that a rotation mixes side by side: each
    head has its two halves one after the other again."""
    return Rule(
        (source,),
        lambda x: x.reshape(-1, head_dim // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape),
        lambda shape: shape,
    )


# The shape that an array has after a rule that changes it.
AFTER: dict[Callable[..., Rule], Callable[[Shape], Shape]] = {
    matrix: lambda shape: shape[:2],
    channels_first: lambda shape: (*shape[:1], *shape[3:], *shape[1:3]),
}


@dataclass(frozen=True)
class Spelling:
    """One way to spell a canonical tensor: templates of the names that it is made of, and the rule that makes it."""

    templates: tuple[str, ...]
    rule: Callable[..., Rule] = copy


Table = dict[str, tuple[Spelling, ...]]


@dataclass(frozen=True)
class Dialect:
    """How a part is named by someone.

    Attributes:
        part: of a model.
        name: for users.
        table: the spellings of each canonical name, by its template, in which `*` stands for a block's number.
        proof: templates of names, at least one of which the source must have.
        is_flipped: whether a template's first number counts from the other end.
    """

    part: str
    name: str
    table: Table
    proof: tuple[str, ...]
    is_flipped: Callable[[str], bool] = lambda template: False

    @cached_property
    def canonical(self) -> dict[str, str]:
        """The template of a canonical name for each template of a name in the source."""
        return {theirs: ours for ours, all_ in self.table.items() for one in all_ for theirs in one.templates}


@lru_cache(2**14)  # the same names are asked for several times
def templated(name: str) -> tuple[str, list[int]]:
    """A name with stars for its blocks' numbers, and these numbers; nothing for a name that has stars itself."""
    if "*" in name:
        return "", []
    numbers = [int(match[2]) for match in _NUMBER.finditer(name)]
    return (_NUMBER.sub(r"\1.*", name), numbers) if numbers else (name, numbers)


def filled(template: str, numbers: list[int]) -> str:
    for number in numbers:
        template = template.replace("*", str(number), 1)
    return template


def _named(pairs: Mapping[str, str], ours: str = "", theirs: str = "") -> Table:
    """Tensors that differ by nothing but their names."""
    return {ours + name: (Spelling((theirs + other,)),) for name, other in pairs.items()}


def _renamed(prefixes: Mapping[str, str]) -> Table:
    """The text encoder's table where names differ by what they begin with."""
    table: Table = {}
    for name in _TEXT:
        ours = next(prefix for prefix in prefixes if name.startswith(prefix))
        table[name] = (Spelling((prefixes[ours] + name.removeprefix(ours),)),)
    return table


# diffusers' transformer: `scripts/convert_flux2_to_diffusers.py` of diffusers, read backwards.
_TOP = {
    "img_in.weight": "x_embedder.weight",
    "txt_in.weight": "context_embedder.weight",
    "time_in.in_layer.weight": "time_guidance_embed.timestep_embedder.linear_1.weight",
    "time_in.out_layer.weight": "time_guidance_embed.timestep_embedder.linear_2.weight",
    "guidance_in.in_layer.weight": "time_guidance_embed.guidance_embedder.linear_1.weight",
    "guidance_in.out_layer.weight": "time_guidance_embed.guidance_embedder.linear_2.weight",
    "double_stream_modulation_img.lin.weight": "double_stream_modulation_img.linear.weight",
    "double_stream_modulation_txt.lin.weight": "double_stream_modulation_txt.linear.weight",
    "single_stream_modulation.lin.weight": "single_stream_modulation.linear.weight",
    "final_layer.linear.weight": "proj_out.weight",
}
_MODULATIONS = tuple(name for name in _TOP if "modulation" in name)
_ADALN = "final_layer.adaLN_modulation.1.weight"
_DOUBLE = {
    "img_attn.proj.weight": "attn.to_out.0.weight",
    "txt_attn.proj.weight": "attn.to_add_out.weight",
    "img_mlp.0.weight": "ff.linear_in.weight",
    "img_mlp.2.weight": "ff.linear_out.weight",
    "txt_mlp.0.weight": "ff_context.linear_in.weight",
    "txt_mlp.2.weight": "ff_context.linear_out.weight",
}
_NORMS = {
    "double_blocks.*.img_attn.norm.query_norm": "transformer_blocks.*.attn.norm_q",
    "double_blocks.*.img_attn.norm.key_norm": "transformer_blocks.*.attn.norm_k",
    "double_blocks.*.txt_attn.norm.query_norm": "transformer_blocks.*.attn.norm_added_q",
    "double_blocks.*.txt_attn.norm.key_norm": "transformer_blocks.*.attn.norm_added_k",
    "single_blocks.*.norm.query_norm": "single_transformer_blocks.*.attn.norm_q",
    "single_blocks.*.norm.key_norm": "single_transformer_blocks.*.attn.norm_k",
}
_QKV = {
    "double_blocks.*.img_attn": ("to_q", "to_k", "to_v"),
    "double_blocks.*.txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
# mflux's names, where they differ from diffusers'.
_MFLUX = {
    "time_in.in_layer.weight": "time_guidance_embed.linear_1.weight",
    "time_in.out_layer.weight": "time_guidance_embed.linear_2.weight",
    "double_blocks.*.img_attn.proj.weight": "transformer_blocks.*.attn.to_out.weight",
}
_SINGLE = {"linear1.weight": "to_qkv_mlp_proj.weight", "linear2.weight": "to_out.weight"}


def _apart(start: str, names: tuple[str, ...]) -> Spelling:
    return Spelling(tuple(f"{start}.{name}.weight" for name in names), join_rows)


def _original() -> Table:
    blocks = [f"double_blocks.*.{name}" for name in _DOUBLE] + [f"single_blocks.*.{name}" for name in _SINGLE]
    table: Table = {name: (Spelling((name,)),) for name in (*_TOP, _ADALN, *blocks)}
    for norm in _NORMS:
        table[f"{norm}.scale"] = (Spelling((f"{norm}.scale",)), Spelling((f"{norm}.weight",)))
    for start in _QKV:
        apart = [_apart(start, tuple(form.format(x) for x in "qkv")) for form in ("{}", "{}_proj", "to_{}")]
        table[f"{start}.qkv.weight"] = (Spelling((f"{start}.qkv.weight",)), *apart)
    return table


def _diffusers() -> Table:
    table = _named(_TOP) | {_ADALN: (Spelling(("norm_out.linear.weight",), swap_halves),)}
    table |= _named(_DOUBLE, "double_blocks.*.", "transformer_blocks.*.")
    table |= _named(_SINGLE, "single_blocks.*.", "single_transformer_blocks.*.attn.")
    table |= {f"{ours}.scale": (Spelling((f"{theirs}.weight",)),) for ours, theirs in _NORMS.items()}
    for ours, theirs in _MFLUX.items():
        table[ours] += (Spelling((theirs,)),)
    return table | {f"{x}.qkv.weight": (_apart("transformer_blocks.*.attn", names),) for x, names in _QKV.items()}


# Of diffusers' VAE in the original naming, without `weight` and `bias`. A level of the decoder counts from below there.
_RESNET = ("norm1", "conv1", "norm2", "conv2")
_VAE = {
    "quant_conv": "encoder.quant_conv",
    "post_quant_conv": "decoder.post_quant_conv",
    "encoder.down_blocks.*.downsamplers.0.conv": "encoder.down.*.downsample.conv",
    "decoder.up_blocks.*.upsamplers.0.conv": "decoder.up.*.upsample.conv",
}
_VAE_ATTENTION: dict[str, str] = {}
for _half, _theirs in (("encoder.down_blocks", "encoder.down"), ("decoder.up_blocks", "decoder.up")):
    _VAE |= {f"{_half}.*.resnets.*.{name}": f"{_theirs}.*.block.*.{name}" for name in _RESNET}
    _VAE[f"{_half}.*.resnets.*.conv_shortcut"] = f"{_theirs}.*.block.*.nin_shortcut"
for _half in ("encoder", "decoder"):
    _VAE |= {f"{_half}.{name}": f"{_half}.{name}" for name in ("conv_in", "conv_out")}
    _VAE[f"{_half}.conv_norm_out"] = f"{_half}.norm_out"
    for _n in (0, 1):
        _VAE |= {f"{_half}.mid_block.resnets.{_n}.{name}": f"{_half}.mid.block_{_n + 1}.{name}" for name in _RESNET}
    _ours, _theirs = f"{_half}.mid_block.attentions.0", f"{_half}.mid.attn_1"
    _VAE[f"{_ours}.group_norm"] = f"{_theirs}.norm"
    _VAE_ATTENTION |= {f"{_ours}.to_{x}": f"{_theirs}.{x}" for x in "qkv"}
    _VAE_ATTENTION[f"{_ours}.to_out.0"] = f"{_theirs}.proj_out"
_BN = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


def _vae(theirs: Callable[[str, str], str], convolution: Callable[[str], Rule] = copy) -> Table:
    """The VAE's table, where `theirs` makes a name out of diffusers' and the original one."""
    table: Table = {name: (Spelling((name,)),) for name in _BN}
    for pairs, kernel in ((_VAE, convolution), (_VAE_ATTENTION, matrix)):
        for ours, original in pairs.items():
            name = theirs(ours, original)
            is_norm = "norm" in ours.rpartition(".")[2]
            table[f"{ours}.weight"] = (Spelling((f"{name}.weight",), copy if is_norm else kernel),)
            table[f"{ours}.bias"] = (Spelling((f"{name}.bias",)),)
    return table


# The text encoder in llama.cpp's naming.
_LLAMA = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LLAMA_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA |= {f"model.layers.*.{ours}.weight": f"blk.*.{theirs}.weight" for ours, theirs in _LLAMA_LAYER.items()}
_HEAD_NORMS = {f"model.layers.*.self_attn.{x}_norm.weight": f"blk.*.attn_{x}_norm.weight" for x in "qk"}
_PERMUTED = {f"model.layers.*.self_attn.{x}_proj.weight": f"blk.*.attn_{x}.weight" for x in "qk"}
_VISION = (
    *("vision_tower.patch_conv.weight", "vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight"),
    "multi_modal_projector.patch_merger.merging_layer.weight",
    *(f"multi_modal_projector.linear_{n}.weight" for n in (1, 2)),
    *(f"vision_tower.transformer.layers.*.attention.{x}_proj.weight" for x in "qkvo"),
    *(f"vision_tower.transformer.layers.*.feed_forward.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(f"vision_tower.transformer.layers.*.{x}_norm.weight" for x in ("attention", "ffn")),
)
_TEXT = (*_LLAMA, *_HEAD_NORMS, *_VISION)
_TOWER = {"vision_tower.": "vision_tower.", "multi_modal_projector.": "multi_modal_projector."}
_MEMORY = {name: f"model.{name}" for name in _TOWER}
# What canonical names begin with, and in what it is spelled, by who saved it.
_TRANSFORMERS = {
    "transformers": {"model.": "model.", "lm_head.": "lm_head.", **_TOWER},
    "transformers without a head": {"model.": "", "lm_head.": "lm_head.", **_TOWER},
    "Mistral on disk": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head.", **_TOWER},
    "Mistral of transformers since 4.52": {"model.": "model.language_model.", "lm_head.": "lm_head.", **_MEMORY},
    "Mistral without a head": {"model.": "language_model.", "lm_head.": "lm_head.", **_TOWER},
}


def _text(name: str, prefixes: Mapping[str, str]) -> Dialect:
    start = f"{prefixes['model.']}layers.*."
    return Dialect(
        "text_encoder", name, _renamed(prefixes), (f"{start}self_attn.q_proj.weight", f"{start}mlp.gate_proj.weight")
    )


_VAE_PROOF = ("decoder.conv_in.weight", "decoder.conv_out.weight", "encoder.conv_in.weight")
_LLAMA_PROOF = ("blk.*.attn_q.weight", "blk.*.ffn_gate.weight")
DIFFUSERS = Dialect("transformer", "diffusers", _diffusers(), tuple(_TOP[name] for name in _MODULATIONS))
DIFFUSERS_VAE = Dialect("vae", "diffusers", _vae(lambda ours, original: ours), _VAE_PROOF)
# Ours and others' of MLX. Nothing but the shapes of convolutions tells it from diffusers'.
MLX_VAE = Dialect("vae", "flux2-mlx", _vae(lambda ours, original: ours, channels_first), _VAE_PROOF)
DIALECTS = (
    Dialect("transformer", "the original release", _original(), _MODULATIONS),
    DIFFUSERS,
    DIFFUSERS_VAE,
    Dialect(
        "vae",
        "the original release",
        _vae(lambda ours, original: original),
        _VAE_PROOF,
        lambda template: template.startswith("decoder.up.*."),
    ),
    Dialect(
        "vae", "mflux", _vae(lambda ours, original: ours.replace("to_out.0", "to_out"), channels_first), _VAE_PROOF
    ),
    *(_text(name, prefixes) for name, prefixes in _TRANSFORMERS.items()),
    Dialect("text_encoder", "llama.cpp", _named(_LLAMA | _HEAD_NORMS), tuple(_HEAD_NORMS.values())),
    Dialect(
        "text_encoder",
        "llama.cpp, with permuted heads",
        _named(_LLAMA) | {ours: (Spelling((theirs,), unpermute),) for ours, theirs in _PERMUTED.items()},
        _LLAMA_PROOF,
    ),
)
