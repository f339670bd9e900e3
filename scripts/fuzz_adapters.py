"""A kind of cases for each naming of adapters: a small file of it, by a trainer's own library where there is one, or
the config beside it, is damaged and read.

    python scripts/fuzz.py 1000 1 --module fuzz_adapters

What a case may come to: the same changes of the same layers, one clear error, other values of these changes where a
value or a factor for all was changed (`values`), or changes of other layers (`others`). A factor that is missing, there
twice or of another shape has to be told.
"""

import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from flux2_mlx.convert.lora import read_adapter
from fuzz import Finding
from fuzz_damage import damaged_json
from fuzz_formats import ACTIONS as USUAL
from fuzz_formats import BYTES, GOLDEN, Sample, Stored, difference, stored

from flux2_mlx.adapters import BiasDifference, Decomposed, Placed
from flux2_mlx.config import TransformerConfig
from flux2_mlx.weights import TensorInfo, read_header

SMALL = TransformerConfig(1, 1, 2, 24, 8, 8, 16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False)
MODEL = {"transformer": SMALL}
CONFIG = "adapter_config.json"
TOLD = ("dropped", "doubled", "misshaped")  # what must not change a value in silence
# What a file may be without: then the changes are others, of which nothing tells.
OPTIONAL = ("alpha", "dora_scale", "lora_magnitude_vector", "diff", "diff_b", "lora_B.bias")
FORMS = {  # of trainers that no library is of: how they name three layers, and the ends of factors
    "kohya": ("lora_unet_{}", "_", ("lora_down.weight", "lora_up.weight"), True),
    "ai_toolkit": ("diffusion_model.{}", ".", ("lora_A.weight", "lora_B.weight"), False),
    "original": ("{}", ".", ("lora_down.weight", "lora_up.weight"), True),
    "named": ("base_model.model.{}", ".", ("lora_A.default.weight", "lora_B.default.weight"), False),
}
LAYERS = {"double_blocks.0.img_attn.qkv": (48, 16), "single_blocks.0.linear2": (16, 64), "img_in": (16, 8)}

SPELLINGS = [("lora_A", "lora_down"), ("lora_B", "lora_up"), ("dora_scale", "lora_magnitude_vector")]
SPELLINGS += [(new, old) for old, new in SPELLINGS]
SPELLINGS += [("diffusion_model.", "transformer."), ("base_model.model.", ""), ("lora_unet_", "lycoris_")]

Changes = dict[tuple[str, int, str], np.ndarray]


class Bench:
    """A file of each kind, with the config beside it if it needs one, and what it changes."""

    def __init__(self, folder: Path):
        self.folder, self.size = folder, 0
        configs = read_metadata("expected")
        self.configs = {name: configs[name].encode() for name in ("peft", "lokr")}
        self.samples = {name: golden(name) for name in ("diffusers", "peft", "lokr", "lycoris")}
        self.samples |= {name: written(name) for name in FORMS}
        self.right = {name: self.read(name, sample.encoded()) for name, sample in self.samples.items()}
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            **{kind: partial(self.damaged, kind) for kind in self.samples},
            "config": self.damaged_config,
        }

    def restore(self) -> None:
        """Nothing of a case is kept."""

    def damaged(self, kind: str, rng: random.Random) -> str:
        """A file with a tensor, a text or bytes changed."""
        sample = self.samples[kind]
        action = rng.choice([*ACTIONS, *BYTES])
        if action in BYTES:
            return self.compared(kind, self.read(kind, BYTES[action](rng, sample.encoded())))
        changed = ACTIONS[action](rng, sample)
        outcome = self.compared(kind, self.read(kind, changed.encoded()))
        told = difference(changed, sample)
        if action in TOLD and outcome == "values" and not any(f".{end} " in f"{told} " for end in OPTIONAL):
            raise Finding("silent", f"{action} {told}")
        return outcome

    def damaged_config(self, rng: random.Random) -> str:
        """What PEFT writes beside a file, with a value or bytes changed."""
        kind = rng.choice([*self.configs])
        config = damaged_json(rng, self.configs[kind])
        return self.compared(kind, self.read(kind, self.samples[kind].encoded(), config))

    def read(self, kind: str, data: bytes, config: bytes | None = None) -> Changes:
        """What a file changes: by network and layer, row and form, in float32."""
        beside, path = self.folder / CONFIG, self.folder / "adapter_model.safetensors"
        beside.unlink(missing_ok=True)
        if kind in self.configs:
            beside.write_bytes(self.configs[kind] if config is None else config)
        path.write_bytes(data)
        self.size = len(data) + len(config or b"")
        found = read_adapter(self.folder)
        found.check(MODEL, "small")
        said = [*found.notes(MODEL, "small"), *found.fates(MODEL).values(), *found.kinds, *found.models, *found.ranks]
        if not all(map(str, said)) or found.scales().keys() != found.modules.keys():
            raise Finding("silent", f"{said}")
        layers = found.load(MODEL, "a").layers
        return {
            (f"{network}.{layer}", one.rows.start if one.rows else 0, type(one.change).__name__): array(one)
            for network, some in layers.items()
            for layer, placed in some.items()
            for one in placed
        }

    def compared(self, kind: str, found: Changes) -> str:
        """What came of a case."""
        right = self.right[kind]
        if {name: x.shape for name, x in found.items()} != {name: x.shape for name, x in right.items()}:
            return "others"
        return "identical" if all(np.array_equal(x, found[name]) for name, x in right.items()) else "values"


def doubled(rng: random.Random, sample: Sample) -> Sample:
    """A factor once more, of zeros, in another spelling, which stands before it."""
    name = rng.choice([*sample.tensors])
    others = [name.replace(old, new) for old, new in SPELLINGS if old in name]
    other, (info, data) = rng.choice(others or [f"lora_unet_{name}"]), sample.tensors[name]
    return sample._replace(tensors={other: Stored(info, bytes(len(data))), **sample.tensors})


ACTIONS = USUAL | {"doubled": doubled}


def array(placed: Placed) -> np.ndarray:
    """What is changed, as numbers; of DoRA the change before it is made as long as is said."""
    change = placed.change
    if isinstance(change, BiasDifference):
        return np.array((change.scale * change.difference).astype(mx.float32))
    if isinstance(change, Decomposed):
        return np.concatenate(
            [np.array(x.astype(mx.float32)).ravel() for x in (change.change.weight(), change.magnitude)]
        )
    return np.array(change.weight().astype(mx.float32))


def read_metadata(name: str) -> dict[str, str]:
    data = (GOLDEN / f"lora_{name}.safetensors").read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def golden(name: str) -> Sample:
    """A file in `tests/golden` that a trainer's library wrote."""
    path = GOLDEN / f"lora_{name}.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    places: Mapping[str, tuple[int, int]] = {key: header[key]["data_offsets"] for key in read_header(path)}
    tensors = {
        key: Stored(info, data[start + places[key][0] : start + places[key][1]])
        for key, info in read_header(path).items()
    }
    return Sample(tensors, header.get("__metadata__", {}))


def written(form: str) -> Sample:
    """A LoRA of three layers in one of `FORMS`."""
    start, dot, ends, has_alpha = FORMS[form]
    tensors = {}
    for layer, (outputs, inputs) in LAYERS.items():
        module = start.format(layer.replace(".", dot))
        for end, shape in zip(ends, ((2, inputs), (outputs, 2)), strict=True):
            tensors[f"{module}.{end}"] = stored("F32", mx.random.normal(shape, key=mx.random.key(len(tensors))))
        if has_alpha:
            tensors[f"{module}.alpha"] = Stored(TensorInfo("F32", ()), np.float32(3).tobytes())
    return Sample(tensors, {"ss_network_module": "networks.lora", "modelspec.title": "small"})
