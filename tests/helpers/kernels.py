"""Bodies of kernels, interpreted: all threads at one time, in NumPy. What is not understood is an error."""

import ast
import re
from typing import Any

import mlx.core as mx
import numpy as np

# A statement of a body and what it is in Python. Divisions become calls of `_divided`, as they depend on the types.
_STATEMENTS = (
    (r"(int|size_t|float) (\w+) = (.+);", "{1} = _{0}({2})"),
    (r"float (\w+)\[(.+)\];", "{0} = [None] * int({1})"),
    (r"(\w+\[.+?\]|\w+) (=|\+=) (.+);", "{0} {1} {2}"),
    (r"for \(int (\w+) = 0; \1 < (.+); \+\+\1\) \{", "for {0} in range({1}):"),
    (r"if \((\w+)\) \{", "if {0}:"),
)


class Buffer:
    """A flat array that is indexed by all threads at once, within its bounds, and written once."""

    def __init__(self, values: np.ndarray):
        self.values = values.flatten()
        self.writes = np.zeros(self.values.size, dtype=int)

    def _checked(self, index: Any) -> Any:
        assert np.min(index) >= 0, "before the buffer"
        assert np.max(index) < self.values.size, "beyond the buffer"
        return index

    def __getitem__(self, index: Any) -> Any:
        return self.values[self._checked(index)]

    def __setitem__(self, index: Any, values: Any) -> None:
        self.values[self._checked(index)] = values
        np.add.at(self.writes, index, 1)


def rounded(values: Any, dtype: mx.Dtype) -> np.ndarray:
    """float32 numbers that `dtype` holds."""
    return np.array(mx.array(np.asarray(values, np.float32)).astype(dtype).astype(mx.float32))


def _divided(a: Any, b: Any) -> Any:
    integers = all(np.issubdtype(np.asarray(x).dtype, np.integer) for x in (a, b))
    return a // b if integers else np.float32(a) / np.float32(b)


class _Divisions(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Div):
            return ast.Call(ast.Name("_divided", ast.Load()), [node.left, node.right], [])
        return node


def _expression(text: str) -> str:
    text = re.sub(r"(\d+\.\d+)f\b", r"_float(\1)", text)
    text = re.sub(r"\b(float|T|size_t)\(", r"_\1(", text)
    return re.sub(r"^(.+?) \? (.+) : (.+)$", r"np.where(\1, \2, \3)", text)


def translated(body: str) -> str:
    """The body in Python."""
    lines: list[str] = []
    depth = 0
    for line in map(str.strip, body.strip().splitlines()):
        if line == "}":
            depth -= 1
            continue
        pattern, template = next((p, t) for p, t in _STATEMENTS if re.fullmatch(p, line))
        match = re.fullmatch(pattern, line)
        assert match is not None
        lines.append("    " * depth + template.format(*map(_expression, match.groups())))
        depth += line.endswith("{")
    assert depth == 0
    return "\n".join(lines)


def interpret(
    body: str,
    threads: dict[str, np.ndarray],
    constants: dict[str, Any],
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[int, ...]],
    lanes: int,
) -> dict[str, np.ndarray]:
    """What a body writes, in float32.

    Args:
        body: the text.
        threads: what each thread knows of its place, arrays of one shape whose last axis is a grid's first.
        constants: of the template, `T` among them, the dtype of outputs.
        inputs: buffers.
        outputs: shapes of what is written.
        lanes: how many threads add up together.
    """

    def lanes_sum(x: np.ndarray) -> np.ndarray:
        groups = x.reshape(*x.shape[:-1], -1, lanes)
        return np.broadcast_to(groups.sum(axis=-1, keepdims=True, dtype=np.float32), groups.shape).reshape(x.shape)

    names: dict[str, Any] = {name: Buffer(np.array(x.astype(mx.float32))) for name, x in inputs.items()}
    written = {name: Buffer(np.full(shape, np.nan, np.float32)) for name, shape in outputs.items()}
    names |= written | threads | constants
    names |= {
        "np": np,
        "_int": np.int64,
        "_size_t": np.int64,
        "_float": np.float32,
        "_T": lambda x: rounded(x, constants["T"]),
        "_divided": _divided,
        "LANES_SUM": lanes_sum,
        "RECIPROCAL_ROOT": lambda x: np.float32(1) / np.sqrt(x),
    }
    tree = ast.fix_missing_locations(_Divisions().visit(ast.parse(translated(body))))
    with np.errstate(over="ignore", invalid="ignore"):
        exec(compile(tree, "body", "exec"), names)
    assert all((buffer.writes == 1).all() for buffer in written.values())
    return {name: buffer.values.reshape(outputs[name]) for name, buffer in written.items()}
