"""The MLX checkpoint: the folder that `convert` writes and the pipeline loads."""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .components import COMPONENTS, GROUPS, by_field, can_paint, geometries, quantizations
from .config import Variant, variant_named
from .errors import CheckpointError, InputError
from .files import Claim, read_bytes
from .json_files import NONSENSE, read_json
from .layers import Adapters, adapted
from .loading import InMemory, fill, module_tensors
from .mixture import finer_layers
from .quantization import (
    MIXED,
    Quantized,
    check_statement,
    is_stated,
    quant_of,
    quantize_module,
    quantized_infos,
    statement,
    wanted_quants,
)
from .staging import bring_back
from .text import TOKENIZER_FILES, TOKENIZERS, PromptTokenizer
from .weights import Files, TensorInfo, Tensors, mismatches, raise_problems

FORMAT_VERSION = 1
MANIFEST = "flux2.json"
FILES = "files"  # in the manifest: bytes and SHA-256 of every other file
DIGEST = "sha256"  # in the manifest: of its other keys
LAST_USED = ".last-used"  # an empty file whose time says when a run last took the checkpoint
TENSOR_HASHES = "tensors.json"  # SHA-256 of the tensors of each file of weights
_FEW_BLOCKS = 8  # missing ones, whose tensors are told by name: as many as an error lists
_PACKAGE = Path(__file__).parent
_SMALL = 1 << 25  # bytes; the largest tokenizer has 17 million, which take some 10 ms to hash


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its geometry, how it is quantized, its files, and what runs beside its layers."""

    name: str
    config: Any
    quantization: dict[str, Any] | None
    files: tuple[Path, ...]
    adapters: Adapters | None = None

    @classmethod
    def open(cls, folder: Path, name: str) -> "Component":
        path = folder / "config.json"
        values = read_json(path)
        quantization = values.pop("quantization", None)
        config = described(name, values, path)
        try:
            check_statement(quantization)
            config.check_known(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path} describes no {name}: {error}") from error
        return cls(name, config, quantization, tuple(sorted(folder.glob("model*.safetensors"))))

    def check(self, path: Path) -> dict[str, TensorInfo]:
        """`infos`; CheckpointError, which names the config at `path`, if there can be no such network."""
        try:
            return self.infos
        except CheckpointError as error:
            raise CheckpointError(f"{path} describes no {self.name}: {error}") from error
        except (*NONSENSE, RuntimeError) as error:  # the last is MLX's for sizes beyond its own integers
            raise _nonsense(self.name, path, error) from error

    def build(self) -> nn.Module:
        """The network with unevaluated zeros for weights, of the dtypes that these are stored in."""
        module = COMPONENTS[self.name].module(self.config)
        module.set_dtype(mx.bfloat16)
        quantize_module(module, self.quantization)
        return module.eval()

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """What `build` loads, by name; built once for all components of one geometry and quantization."""
        return dict(_infos(self.name, self.config, json.dumps(self.quantization)))

    @property
    def tensors(self) -> Tensors:
        """The weights as they are stored."""
        return Files(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored."""
        return sum(tensor.nbytes for tensor in self.infos.values())

    def quantized(self, quant: str, ranking: Sequence[str] | None = None) -> "Component":
        """This component as it would be stored with `quant`; with `mixed4` as `finer_layers` says of the `ranking`, or,
        without one, as it is stored so already."""
        if ranking is None and self.quantization is not None and quant_of(self.quantization) == quant:
            return self
        plain = replace(self, quantization=None).infos
        layers = [(name.removesuffix(".weight"), x.shape) for name, x in plain.items() if len(x.shape) == 2]
        finer = finer_layers(self.name, dict(layers), ranking) if quant == MIXED else ()
        return replace(self, quantization=statement(quant, self.name, layers, finer))

    def verify(self, folder: Path) -> None:
        """Compare lengths, names, shapes and dtypes in the files with the geometry; CheckpointError lists all that is
        wrong in the component's `folder`."""
        found = self.tensors.infos
        check_counts(COMPONENTS[self.name].counts(self.config), found, folder / "config.json")
        problems = mismatches(self.check(folder / "config.json"), found)
        raise_problems(f"{folder} is damaged, convert the model again", problems)

    def load(self, dtype: mx.Dtype, quant: str | None = None) -> nn.Module:
        """The network with its weights in memory.

        Args:
            dtype: of the activations (see `memory_dtype`).
            quant: quantize while loading; only for a component stored as `bf16`.
        """
        target = self if quant is None else self.quantized(quant)
        module = target.build()
        tensors = self.tensors
        if self.quantization is None:
            tensors = as_stored(tensors, target)
        fill(module, InMemory(tensors, dtype))
        return adapted(module, self.adapters)


@lru_cache(maxsize=64)
def _infos(name: str, config: Any, quantization: str) -> dict[str, TensorInfo]:
    if (stated := json.loads(quantization)) is not None:
        return quantized_infos(_infos(name, config, json.dumps(None)), stated)
    return module_tensors(Component(name, config, None, ()).build())


def as_stored(tensors: Tensors, component: Component) -> Tensors:
    """`tensors`, which are those of `component` in 16 bits, quantized if it is stored quantized."""
    if component.quantization is None:
        return tensors
    return Quantized(tensors, component.infos, component.quantization)


def described(name: str, values: dict[str, Any], path: Path, section: str = "") -> Any:
    """The geometry of the network `name` that a `section` (`text_config.`) of the file at `path` describes.

    Raises:
        CheckpointError: it describes none. Nothing is built to find out.
    """
    try:
        return COMPONENTS[name].config.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path} describes no {name}: {section}{error}") from error
    except NONSENSE as error:
        raise _nonsense(name, path, error) from error


def _nonsense(name: str, path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} describes no {name} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")


def check_counts(counts: dict[str, tuple[str, int]], names: Iterable[str], path: Path) -> None:
    """CheckpointError if the config at `path` asks for many more blocks than `names` of tensors are there for.

    A few are better named one by one, by who compares all tensors.

    Args:
        counts: by the start of their names, which their number follows: the key of the config, and what it says.
        names: of the tensors in the files.
        path: of the config.
    """
    for prefix, (key, count) in counts.items():
        found = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
        if count > len(found) + _FEW_BLOCKS:
            raise CheckpointError(f"{path}: {key} is {count}, but the files hold {len(found)} of {prefix}*")


@dataclass(frozen=True)
class Checkpoint:
    """A verified MLX checkpoint folder, which `models rm` leaves alone as long as this is there."""

    folder: Path
    variant: Variant
    quant: str
    text_quant: str
    source: dict[str, Any]
    components: dict[str, Component]
    claim: Claim | None = field(default=None, compare=False, repr=False)

    @classmethod
    def outline(
        cls, variant: Variant, quant: str, text_quant: str, components: dict[str, Component] | None = None
    ) -> "Checkpoint":
        """What a model will be when it is converted, without files; `components` are by default the variant's own."""
        if components is None:
            components = variant_components(variant, quant, text_quant)
        return cls(Path(), variant, quant, text_quant, {}, components)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read and verify the folder without reading weights.

        Raises:
            CheckpointError: not an MLX checkpoint, of another format version, incomplete or damaged.
        """
        if not is_checkpoint(folder):
            raise CheckpointError(f"{folder} is not an MLX checkpoint: it has no {MANIFEST}")
        claim = None
        with suppress(OSError):  # a folder that can't be listed
            claim = Claim(folder)
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has format version {reprlib.repr(manifest.get('format_version'))}, this version of "
                f"flux2-mlx reads {FORMAT_VERSION}; convert the model again"
            )
        if _is_changed(manifest):
            raise CheckpointError(f"{folder / MANIFEST} was changed after the conversion; convert the model again")
        try:
            quant, text_quant = (manifest["quantization"][group] for group in GROUPS)
            checkpoint = cls(
                folder,
                variant_named(manifest["variant"]),
                quant,
                text_quant,
                dict(manifest["source"]),
                {name: Component.open(folder / name, name) for name in manifest["components"]},
                claim,
            )
            checkpoint._check_consistency()
        except (*NONSENSE, InputError) as error:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
        for name, component in checkpoint.components.items():
            component.verify(folder / name)
        if not checkpoint.tokenizer_file.is_file():
            raise CheckpointError(f"{folder} is incomplete: there is no {checkpoint.tokenizer_file}")
        _ = checkpoint.tokenizer  # refuses what does not belong to the encoder
        checkpoint._check_small_files(manifest)
        return checkpoint

    def _check_consistency(self) -> None:
        """Compare the manifest with the components, and these with each other."""
        if "text_encoder" not in self.components:
            raise InputError("it lists no text_encoder")
        for name, component in self.components.items():
            quant = quantizations(self.quant, self.text_quant)[name]
            if not is_stated(quant, component.quantization):
                raise InputError(f"it says {quant} where the {name} is stored as {quant_of(component.quantization)}")
        check_fit(self.variant, {name: component.config for name, component in self.components.items()})

    def _check_small_files(self, manifest: dict[str, Any]) -> None:
        """Compare files beside the weights with their records, if there are any: a change would show in no shape."""
        try:
            records = recorded(manifest)
        except InputError as error:
            raise CheckpointError(f"{self.folder / MANIFEST} {error}") from error
        again = "convert the model again (also where this was done on purpose)"
        for name, record in records.items():
            size = record["bytes"]
            if name.endswith(".safetensors") or not isinstance(size, int) or size > _SMALL:
                continue
            path = self.folder / name
            try:
                same = path.stat().st_size == size and _digest(path) == record["sha256"]
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} is missing; {again}") from error
            except OSError as error:
                raise CheckpointError(f"can't read {path}: {error.strerror}") from error
            if not same:
                raise CheckpointError(f"{path} is not what was converted; {again}")
        for path in self.tokenizer_files if records else ():
            if path.relative_to(self.folder).as_posix() not in records:
                raise CheckpointError(f"{path} was not there after the conversion; remove it, or {again}")

    @property
    def quants(self) -> tuple[str, str]:
        """How the transformer and the text encoder are stored."""
        return self.quant, self.text_quant

    @property
    def paints(self) -> bool:
        """Whether images can be made, and not only text be written."""
        return can_paint(self.components)

    @property
    def is_built_in(self) -> bool:
        """Whether it comes with this package, so that it stays as it is."""
        return self.folder.is_relative_to(_PACKAGE)

    @property
    def folded(self) -> list[dict[str, Any]]:
        """The adapters that are folded into the weights: `source`, `sha256`, `scale` and maybe `config` of each."""
        adapters = self.source.get("adapters")
        return [one for one in adapters if isinstance(one, dict)] if isinstance(adapters, list) else []

    @property
    def origins(self) -> dict[str, str]:
        """Where each part came from that was not in the source itself, as far as that was recorded."""
        parts = self.source.get("parts")
        return {str(part): str(place) for part, place in parts.items()} if isinstance(parts, dict) else {}

    @property
    def fitted_variant(self) -> Variant:
        """`variant` with the geometries of the networks that are here, which may be others than the released ones."""
        return fitted(self.variant, {name: component.config for name, component in self.components.items()})

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        text = self.components["text_encoder"].config
        return TOKENIZERS[text.model_type](self.tokenizer_file, text.vocab_size)

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer" / "tokenizer.json"

    @property
    def tokenizer_files(self) -> list[Path]:
        """All that the tokenizer is read from."""
        return [path for name in TOKENIZER_FILES if (path := self.tokenizer_file.with_name(name)).is_file()]


def fitted(variant: Variant, configs: dict[str, Any]) -> Variant:
    """`variant` with the geometries of `configs`; CheckpointError if networks of these can't work together."""
    return replace(variant, **by_field(configs))


def check_fit(variant: Variant, configs: dict[str, Any]) -> None:
    """Raise CheckpointError if networks of these geometries can't work together as `variant`."""
    if can_paint(configs):
        fitted(variant, configs)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is in our format (it may still be damaged). What a killed conversion moved aside is put back."""
    bring_back(folder)
    return (folder / MANIFEST).is_file()


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the digest of its other keys, by which a later change is found."""
    others = {key: value for key, value in manifest.items() if key != DIGEST}
    return others | {DIGEST: hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()}


def _is_changed(manifest: dict[str, Any]) -> bool:
    """Whether a manifest is not what its digest says; one without a digest can't tell."""
    try:
        return DIGEST in manifest and manifest[DIGEST] != sealed(manifest)[DIGEST]
    except RecursionError:  # what can just be read may be nested too deep to be written
        return True


def recorded(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The record of each other file, its `bytes` and `sha256`, by its path; none in a checkpoint of older versions.

    Raises:
        InputError: the manifest does not say which files there are.
    """
    records = manifest.get(FILES)
    if records is None:
        return {}
    if isinstance(records, dict) and records and all(_is_record(*item) for item in records.items()):
        return records
    raise InputError("is damaged: it does not say which files there are")


def _is_record(name: str, record: Any) -> bool:
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(record, dict) and all(key in record for key in ("bytes", "sha256"))


def _digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path, _SMALL)).hexdigest()


def variant_components(variant: Variant, quant: str, text_quant: str | None = None) -> dict[str, Component]:
    """The networks of a variant as they would be stored, without files."""
    quants = quantizations(*wanted_quants(quant, text_quant))
    return {name: Component(name, x, None, ()).quantized(quants[name]) for name, x in geometries(variant).items()}


def variant_sizes(variant: Variant, quant: str, text_quant: str | None = None) -> dict[str, int]:
    """Bytes of each component's stored weights, from the geometry alone."""
    quants = quantizations(*wanted_quants(quant, text_quant))
    return {name: _stored_bytes(name, config, quants[name]) for name, config in geometries(variant).items()}


@lru_cache(maxsize=128)  # variants share geometries
def _stored_bytes(name: str, config: Any, quant: str) -> int:
    return Component(name, config, None, ()).quantized(quant).nbytes
