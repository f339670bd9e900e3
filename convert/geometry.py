"""From canonical names and shapes alone to the geometry of the networks, and to the models that have it.

What shapes can't tell, such as the angles of positions, comes from the row of the table that fits. A model that fits
no row is refused: there its `config.json` is needed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from flux2_mlx.config import VARIANTS, Config, TextConfig, VAEConfig, Variant, VisionConfig, variant_named
from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import NONSENSE
from flux2_mlx.weights import TensorInfo

from .naming import Reading
from .rules import Shape

_Infos = Mapping[str, TensorInfo]
_FOLDER = "give the whole model's folder, with its config.json files"
_AGAIN = "fetch the file again, or give a complete one"
_GUIDANCE = ("guidance_in.in_layer.weight", "guidance_in.out_layer.weight")
_TOWER = "vision_tower."
# Language models that it uses, by their kind and width.
_TEXT = {("qwen3", 2560): "Qwen3-4B", ("qwen3", 4096): "Qwen3-8B", ("mistral3", 5120): "Mistral-Small-3.2-24B"}
# Language models that FLUX.2 does not use, by what tells them apart: the kind, the width and the number of layers.
_OTHER_TEXT = {
    ("qwen3", 1024, 28): "Qwen3-0.6B",
    ("qwen3", 2048, 28): "Qwen3-1.7B",
    ("qwen3", 5120, 40): "Qwen3-14B",
    ("qwen3", 5120, 64): "Qwen3-32B",
    ("mistral3", 4096, 32): "Mistral-7B or Llama-8B",
}
_OTHER_VAE = {4: "Stable Diffusion", 16: "FLUX.1, SD3 or Qwen-Image"}
# In metadata of safetensors and GGUF files, what may say which model it is.
_TITLES = (
    "modelspec.architecture",
    "modelspec.title",
    "general.name",
    "general.basename",
    "general.finetune",
    "general.base_model.0.repo_url",
    "general.base_model.0.name",
    "base_model",
    "model_name",
    "name",
    "title",
)
_MAX_TITLE = 500
_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_UNCERTAIN = re.compile(r"(?:un|de)[^a-z0-9]*distill")


def geometry(part: str, infos: _Infos, what: str) -> dict[str, Config]:
    """The geometries of the networks that are made of a part.

    Args:
        part: `transformer`, `text_encoder` or `vae`.
        infos: its tensors by their canonical names; none but those that tell are looked at.
        what: the source, for errors.

    Raises:
        CheckpointError: it is no part of a model in the table, or one of those tensors is missing or of no such shape.
    """
    try:
        return _READERS[part](infos)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except NONSENSE as error:
        raise CheckpointError(f"{what} describes no {part} ({type(error).__name__}: {error})") from error


def understood(reading: Reading, what: str, wrong: str) -> tuple[dict[str, Config], CheckpointError | None]:
    """The geometries of the networks that are made of a part, as far as they are known, and what is wrong with it: all
    its tensors should have a place in them.

    Args:
        reading: the part as it was found.
        what: the source, for errors.
        wrong: what is said of it if tensors are missing, left over or of other shapes.
    """
    configs: dict[str, Config] = {}
    try:
        configs = geometry(reading.part, reading.infos, what)
        reading.check(configs, wrong)
    except CheckpointError as error:
        if mixed := reading.mixed:
            return configs, CheckpointError(f"{what} {mixed}; fetch the file again, or give one that names all alike")
        return configs, error
    return configs, None


def candidates(configs: Mapping[str, Config]) -> list[Variant]:
    """The models that networks of these geometries can be of, in the order of the table."""
    return [row for row in VARIANTS.values() if all(_FITS[name](row, config) for name, config in configs.items())]


def text_name(text: TextConfig) -> str | None:
    """The name of the language model that a text encoder of this geometry is; None: it has no name."""
    return _TEXT.get((text.model_type, text.hidden_size))


def titles(metadata: Mapping[str, str], file: str = "", repo: str = "") -> list[str]:
    """What may name a model, most trustworthy first: a file's metadata, its name, and the repository's.

    Args:
        metadata: what a file's header says of it.
        file: its name without folders.
        repo: `owner/name`.
    """
    texts = [*(metadata.get(key) for key in _TITLES), file.rpartition(".")[0] or file, repo.rpartition("/")[2]]
    return [text[:_MAX_TITLE].rpartition("/")[2] for text in texts if isinstance(text, str) and text]


def choose(rows: list[Variant], hints: Iterable[str], name: str | None, what: str) -> Variant:
    """The one model of these `candidates`.

    Args:
        rows: the models that it can be.
        hints: texts of `titles`; the first that tells decides.
        name: the model that a user says it is, or None.
        what: the source, for the error.

    Raises:
        CheckpointError: it can't be known, or not be `name`; the candidates are named.
    """
    names = ", ".join(row.name for row in rows)
    if name is not None:
        if (row := variant_named(name)) not in rows:
            raise CheckpointError(f"{what} can't be {name}: its geometry is that of {names or 'no model'}")
        return row
    if not rows:
        raise CheckpointError(f"{what} has parts of different models; give those of one")
    left = rows if len(rows) == 1 else next(filter(None, (_told(rows, hint) for hint in hints)), rows)
    if len(left) != 1:
        raise CheckpointError(f"can't tell which model {what} is; name it with variant=NAME ({names})")
    return left[0]


def _told(rows: list[Variant], hint: str) -> list[Variant]:
    """The rows that a name points to; none if it tells nothing."""
    text = _CASE.sub(" ", hint).lower()
    words = set(re.findall("[a-z]+", text))
    if _UNCERTAIN.search(text):
        return []
    if words & {"kv", "bkv"}:
        return [row for row in rows if row.kv_cache]
    if words & {"base", "bbase", "kleinbase"}:
        return [row for row in rows if not row.distilled]
    if "klein" in text and re.search("(?<![0-9])[49] ?b(?!f)", text):
        return [row for row in rows if row.distilled and not row.kv_cache]
    return []


def _transformer(infos: _Infos) -> dict[str, Config]:
    width, channels = _shape(infos, "img_in.weight", 2)
    head = _shape(infos, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    told = {
        "num_layers": _count(infos, "double_blocks."),
        "num_single_layers": _count(infos, "single_blocks."),
        "num_attention_heads": _divided(width, head, "img_in.weight"),
        "joint_attention_dim": _shape(infos, "txt_in.weight", 2)[1],
        "attention_head_dim": head,
        "in_channels": channels,
        "timestep_guidance_channels": _shape(infos, "time_in.in_layer.weight", 2)[1],
        "mlp_ratio": _shape(infos, "double_blocks.0.img_mlp.2.weight", 2)[1] / width,
        "guidance_embeds": any(name.startswith("guidance_in.") for name in infos),
    }
    config = _agreeing((row.transformer for row in VARIANTS.values()), told)
    if config is None and _agreeing((row.transformer for row in VARIANTS.values()), told | {"guidance_embeds": True}):
        raise CheckpointError(f"there is no {' and no '.join(_GUIDANCE)}, which dev needs; {_AGAIN}")
    if config is None:
        blocks = f"{told['num_layers']} double and {told['num_single_layers']} single blocks"
        raise CheckpointError(
            f"it is a FLUX.2 transformer of no known size: {width} features, {blocks}, {told['joint_attention_dim']} "
            f"text features; {_FOLDER}"
        )
    return {"transformer": config}


def _vae(infos: _Infos) -> dict[str, Config]:
    latents = _shape(infos, "decoder.conv_in.weight", 4)[1]
    told = {
        "block_out_channels": _channels(infos, "encoder.down_blocks."),
        "layers_per_block": _count(infos, "encoder.down_blocks.0.resnets."),
        "latent_channels": latents,
    }
    decoder = _channels(infos, "decoder.up_blocks.")[::-1]
    config = _agreeing((row.vae for row in VARIANTS.values()), told)
    if config is None:
        whose = f"as that of {_OTHER_VAE[latents]}" if latents in _OTHER_VAE else "of no known size"
        raise CheckpointError(f"it is a VAE of {latents} latent channels, {whose}; FLUX.2's has 32")
    values = {"decoder_block_out_channels": None if decoder == config.block_out_channels else decoder}
    return {"vae": VAEConfig.from_dict(config.to_dict() | values)}


def _channels(infos: _Infos, levels: str) -> tuple[int, ...]:
    """The channels that each level gives."""
    count = _count(infos, levels)
    return tuple(_shape(infos, f"{levels}{level}.resnets.0.conv1.weight", 4)[0] for level in range(count))


def _text(infos: _Infos) -> dict[str, Config]:
    told = _text_values(infos)
    layers = _count(infos, "model.layers.")
    found = next((row for row in VARIANTS.values() if _agrees(row.text, told)), None)
    if found is None:
        raise CheckpointError(_other_text(told, layers))
    row = found.text
    last = found.text.num_hidden_layers
    full = last + row.num_later_layers
    if not last <= layers <= full:
        raise CheckpointError(f"the text encoder has {layers} layers, but {last} to {full} are needed")
    has_head = "model.norm.weight" in infos and (row.tie_word_embeddings or "lm_head.weight" in infos)
    values = {
        "vocab_size": _shape(infos, "model.embed_tokens.weight", 2)[0],
        "num_later_layers": row.num_later_layers if layers == full and has_head else 0,
    }
    configs: dict[str, Config] = {"text_encoder": TextConfig.from_dict(row.to_dict() | values)}
    if values["num_later_layers"]:
        configs["language_model"] = configs["text_encoder"]
    if found.vision is not None and any(name.startswith(_TOWER) for name in infos):
        configs["vision"] = _vision(infos, found.vision)
    return configs


def _text_values(infos: _Infos) -> dict[str, Any]:
    """What shapes tell of a text model; heads are as wide as those of its kind."""
    layer = "model.layers.0."
    is_qwen = f"{layer}self_attn.q_norm.weight" in infos
    width = _shape(infos, "model.embed_tokens.weight", 2)[1]
    kind = "qwen3" if is_qwen else "mistral3"
    rows = [row.text for row in VARIANTS.values() if row.text.model_type == kind]
    head = _shape(infos, f"{layer}self_attn.q_norm.weight", 1)[0] if is_qwen else rows[0].head_dim
    queries, keys = (_shape(infos, f"{layer}self_attn.{x}_proj.weight", 2)[0] for x in "qk")
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": _shape(infos, f"{layer}mlp.gate_proj.weight", 2)[0],
        "num_attention_heads": _divided(queries, head, "q_proj"),
        "num_key_value_heads": _divided(keys, head, "k_proj"),
        "head_dim": head,
    }


def _other_text(told: dict[str, Any], layers: int) -> str:
    kind, width = told["model_type"], told["hidden_size"]
    name = _OTHER_TEXT.get((kind, width, layers), "a language model")
    return (
        f"the text encoder is {name}, with {width} features, {told['intermediate_size']} in between and {layers} "
        "layers; FLUX.2 klein needs Qwen3-4B or Qwen3-8B, dev Mistral-Small-3.2-24B"
    )


def _vision(infos: _Infos, row: VisionConfig) -> VisionConfig:
    width, _, patch, _ = _shape(infos, f"{_TOWER}patch_conv.weight", 4)
    merged = _shape(infos, "multi_modal_projector.patch_merger.merging_layer.weight", 2)[1]
    told = {
        "hidden_size": width,
        "patch_size": patch,
        "intermediate_size": _shape(infos, f"{_TOWER}transformer.layers.0.feed_forward.gate_proj.weight", 2)[0],
        "num_hidden_layers": _count(infos, f"{_TOWER}transformer.layers."),
        "text_hidden_size": _shape(infos, "multi_modal_projector.linear_1.weight", 2)[0],
        "spatial_merge_size": round(_divided(merged, width, "merging_layer") ** 0.5),
    }
    if not _agrees(row, told):
        raise CheckpointError(f"the vision tower is of no known size: {told}; {_FOLDER}")
    return row


_READERS: dict[str, Callable[[_Infos], dict[str, Config]]] = {
    "transformer": _transformer,
    "text_encoder": _text,
    "vae": _vae,
}
# Whether a network can be of a model. Text encoders may have been cut or given other words.
_FITS: dict[str, Callable[[Variant, Any], bool]] = {
    "transformer": lambda row, config: row.transformer == config,
    "text_encoder": lambda row, config: _width(row.text) == _width(config),
    "language_model": lambda row, config: _width(row.text) == _width(config),
    "vision": lambda row, config: row.vision == config,
    "vae": lambda row, config: row.vae == replace(config, decoder_block_out_channels=None),
}


def _width(text: TextConfig) -> tuple[str, int, int]:
    return text.model_type, text.hidden_size, text.intermediate_size


def _agreeing(configs: Iterable[Any], told: dict[str, Any]) -> Any:
    """The first of these geometries that agrees with what shapes tell, or None."""
    return next((config for config in configs if _agrees(config, told)), None)


def _agrees(config: Config, told: dict[str, Any]) -> bool:
    return all(getattr(config, key) == value for key, value in told.items())


def _shape(infos: _Infos, name: str, rank: int) -> Shape:
    """The shape of a tensor that has to be there, of `rank` dimensions, none of them empty."""
    if name not in infos:
        raise CheckpointError(f"there is no {name}; {_AGAIN}")
    shape = infos[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{name} is of shape {list(shape)}, which is none of {rank} dimensions")
    return shape


def _count(infos: _Infos, prefix: str) -> int:
    """How many different block numbers follow `prefix` in names."""
    return len(set(_numbers(infos, prefix)))


def _numbers(infos: _Infos, prefix: str) -> Iterator[str]:
    return (name[len(prefix) :].partition(".")[0] for name in infos if name.startswith(prefix))


def _divided(size: int, count: int, name: str) -> int:
    if size % count:
        raise CheckpointError(f"{name} has {size} features, which do not divide into parts of {count}")
    return size // count
