"""What the shapes of a part's tensors, by their canonical names, tell of its geometry."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flux2_mlx.config import Config
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

from .rules import Shape

Infos = Mapping[str, TensorInfo]
GIVE_FOLDER = "give the whole model's folder, with its config.json files"
AGAIN = "fetch the file again, or give a complete one"


def agreeing(configs: Iterable[Any], told: dict[str, Any]) -> Any:
    """The first of these geometries that agrees with what shapes tell, or None."""
    return next((config for config in configs if agrees(config, told)), None)


def agrees(config: Config, told: dict[str, Any]) -> bool:
    return all(getattr(config, key) == value for key, value in told.items())


def shape_of(infos: Infos, name: str, rank: int) -> Shape:
    """The shape of a tensor that has to be there, of `rank` dimensions, none of them empty."""
    if name not in infos:
        raise CheckpointError(f"there is no {name}; {AGAIN}")
    shape = infos[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{name} is of shape {list(shape)}, which is none of {rank} dimensions")
    return shape


def block_count(infos: Infos, prefix: str) -> int:
    """How many different block numbers follow `prefix` in names."""
    return len(set(_numbers(infos, prefix)))


def _numbers(infos: Infos, prefix: str) -> Iterator[str]:
    return (name[len(prefix) :].partition(".")[0] for name in infos if name.startswith(prefix))


def divided(size: int, count: int, name: str) -> int:
    if size % count:
        raise CheckpointError(f"{name} has {size} features, which do not divide into parts of {count}")
    return size // count
