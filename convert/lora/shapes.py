"""Whether the factors of a module fit each other, and what they say of its layer, by their dtypes and shapes alone."""

from collections.abc import Mapping
from functools import cached_property

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import FLOATS, TensorInfo

from ..rules import Shape
from .keys import FULL, LOHA, LOKR, LORA, Module

_DTYPES = (*FLOATS.values(), "F64")
_NUMBERS = (*_DTYPES, "I64", "I32", "I16", "I8", "U8")  # of what has a single value
# The sizes of each factor's dimensions, a letter for each: o and i are what the layer gives and takes, or o = a·c and
# i = b·d; r and s are ranks.
_SIZES = {
    LORA: {"down": "ri", "up": "or", "mid": "rr", "bias": "o"},
    LOKR: {
        "lokr_w1": "ab",
        "lokr_w1_a": "as",
        "lokr_w1_b": "sb",
        "lokr_w2": "cd",
        "lokr_w2_b": "rd",
        "lokr_w2_a": "cr",
    },
    LOHA: {"hada_w1_b": "ri", "hada_w1_a": "or", "hada_w2_b": "si", "hada_w2_a": "os"},
    FULL: {"diff": "oi"},
    None: {},
}
# The same where there is a core between two factors, which then both have the rank first.
_CORES = {
    "lokr_t2": {"lokr_t2": "rr", "lokr_w2_a": "rc"},
    "hada_t1": {"hada_t1": "rr", "hada_w1_a": "ro", "hada_t2": "ss", "hada_w2_a": "so"},
}


def matrix(shape: Shape) -> Shape:
    """A shape without the pixels of a kernel, if that has but one."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape


class Factors:
    """The tensors of a `module`, given the `infos` of all tensors of its file."""

    def __init__(self, module: Module, infos: Mapping[str, TensorInfo]):
        self.module = module
        self._infos = {role: infos[key] for role, key in module.keys.items()}

    @property
    def rank(self) -> int | None:
        """The one that alpha is divided by; None: the factors are whole matrices."""
        return self._sizes.get("r", self._sizes.get("s"))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Those of the tensors by what they are."""
        return {role: info.shape for role, info in self._infos.items()}

    @property
    def outputs(self) -> int:
        return self._sizes["o"]

    @property
    def inputs(self) -> int | None:
        """None: nothing but a bias changes."""
        return self._sizes.get("i")

    def check(self) -> None:
        """CheckpointError unless dtypes are read, and shapes agree with each other."""
        for role, info in self._infos.items():
            key = self.module.keys[role]
            if info.dtype not in (_NUMBERS if role == "alpha" else _DTYPES):
                raise CheckpointError(f"{key} is stored as {info.dtype}, which is not read; fetch it as F16 or BF16")
            if 0 in info.shape or (role == "alpha" and info.shape not in ((), (1,))):
                raise CheckpointError(f"{key} is of shape {list(info.shape)}, which is no {_what(role)}")
        if self._is_transposed:
            raise CheckpointError(f"the factors of {self.module.name} are stored transposed; fetch the adapter again")
        _ = self._sizes

    @property
    def _is_transposed(self) -> bool:
        """Whether a LoRA's factors fit each other the other way round only."""
        shapes = [matrix(self._infos[role].shape) for role in ("down", "up") if role in self._infos]
        if self.module.kind != LORA or "mid" in self._infos or [len(shape) for shape in shapes] != [2, 2]:
            return False
        down, up = shapes
        return down[0] != up[1] and down[1] == up[0] < min(down[0], up[1])

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """By the letters of the table; CheckpointError if a factor does not fit those before it."""
        dimensions = _SIZES[self.module.kind] | {"diff_b": "o"}
        for core, others in _CORES.items():
            dimensions |= others if core in self._infos else {}
        sizes: dict[str, int] = {}
        for role, letters in dimensions.items():
            if role in self._infos:
                self._add(role, letters, sizes)
            if role == "lokr_w2_a" or (role == "lokr_w2" and role in self._infos):
                sizes |= {"o": sizes["a"] * sizes["c"], "i": sizes["b"] * sizes["d"]}
        if "magnitude" in self._infos:
            self._check_magnitude(sizes)
        return sizes

    def _add(self, role: str, letters: str, sizes: dict[str, int]) -> None:
        shape = matrix(self._infos[role].shape)
        if len(shape) != len(letters):
            raise self._misfit(role, f"{len(letters)} dimensions")
        wanted = [sizes.setdefault(letter, size) for letter, size in zip(letters, shape, strict=True)]
        if wanted != list(shape):
            raise self._misfit(role, str(wanted))

    def _check_magnitude(self, sizes: Mapping[str, int]) -> None:
        shapes = [(sizes["o"], 1), (sizes["o"],), (1, sizes["i"])]
        if matrix(self._infos["magnitude"].shape) not in shapes:
            raise self._misfit("magnitude", f"{list(shapes[0])} or {list(shapes[2])}")

    def _misfit(self, role: str, wanted: str) -> CheckpointError:
        key = self.module.keys[role]
        shape = list(self._infos[role].shape)
        return CheckpointError(f"{key} is of shape {shape} instead of {wanted}, which the factors beside it ask for")


def _what(role: str) -> str:
    return "single number" if role == "alpha" else "factor"
