"""Measures of the code: how far things travel through it, how often a run does what, and how long its parts are.

    python scripts/house.py                    of this tree
    python scripts/house.py --tree FOLDER      of another one, such as `git worktree add FOLDER COMMIT` makes
    python scripts/house.py --json

A room is a source file of the product. A thing is in a room when a function of that file is called with it, in an
argument or up to three objects inside one, and again when what that function has called with it returns. What follows
each other in one file is one stay. A climb is a stay whose room comes later in `STOREYS` in tests/test_project.py than
that of the stay before: the way leads back up. Of a weight its name is followed, of a picture its path and the
picture as long as it has its size. Runs are of the built-in model, 64 × 64 pixels in two steps, in one process.
"""

import argparse
import ast
import functools
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {"transformer", "text_encoder", "vae"}
PROMPT, LIMIT, REFERENCE, WEIGHT = "a small red circle", 3_999_999_937, "reference-271.png", "img_attn.qkv.weight"
SIZE = (80, 96)  # of the picture to start from, which no other one has
RUN = ["-m", "demo", "-W", "64", "-H", "64", "-s", "2", "--seed", "1", "--force", "-o", "image.png"]
# The run that each thing is followed in, and how it is known. What is named differs, so runs differ only in that.
T2I, I2I = ["t2i", PROMPT, *RUN, "--memory-limit", str(LIMIT)], ["i2i", PROMPT, *RUN, "-i", REFERENCE]
THINGS = {"prompt": T2I, "memory limit": T2I, "weight": T2I, "reference image": I2I}
COUNTED = {
    "Request.checked": r"Request\.checked",
    "plan": r"(\w+\.)?plan",
    "find_checkpoint": r"find_checkpoint",
    "Component.build": r"Component\.build",
    "Component.load": r"Component\.load",
}
_DEPTH = 3
# The command line of a tree, whose folder and arguments follow: flux2_mlx.convert is the tree's, too.
COMMAND = """
import sys
import flux2_mlx
flux2_mlx.__path__.append(sys.argv.pop(1))
from flux2_mlx.__main__ import main
try:
    main()
finally:
    print(sum(name.split(".")[0] == "flux2_mlx" for name in sys.modules), len(sys.modules))
"""


class Way:
    """Where a thing has been."""

    def __init__(self, rooms: dict[str, int], is_thing: Callable[[Any], bool]):
        self._rooms, self._is_thing = rooms, is_thing
        self._calls: list[tuple[FrameType, str]] = []  # those that were given the thing and have not returned
        self.stays: list[str] = []

    def call(self, room: str, frame: FrameType) -> None:
        code = frame.f_code  # whose locals are not set yet, but for the arguments, which come first
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + 2]
        if any(self._holds(frame.f_locals[name], _DEPTH) for name in names if name in frame.f_locals):
            self._calls.append((frame, room))
            self._enter(room)

    def back(self, frame: FrameType) -> None:
        if self._calls and self._calls[-1][0] is frame:
            self._calls.pop()
            if self._calls:
                self._enter(self._calls[-1][1])

    def _enter(self, room: str) -> None:
        if self.stays[-1:] != [room]:
            self.stays.append(room)

    def _holds(self, value: Any, depth: int) -> bool:
        if self._is_thing(value):
            return True
        return depth > 0 and any(self._holds(part, depth - 1) for part in parts(value))

    def figures(self) -> dict[str, int]:
        heights = [self._rooms.get(Path(room).parts[1].removesuffix(".py"), 0) for room in self.stays]
        climbs = sum(later > former for former, later in itertools.pairwise(heights))
        return {"stays": len(self.stays), "rooms": len(set(self.stays)), "climbs": climbs}


def parts(value: Any) -> Iterator[Any]:
    """What is inside a value: items, and attributes of objects of the product; nothing of a network."""
    if isinstance(value, dict):
        if type(value) is dict:
            yield from value
            yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif type(value).__module__.startswith("flux2_mlx") and not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).values()


def is_reference(value: Any) -> bool:
    from PIL import Image

    return (isinstance(value, str | Path) and REFERENCE in str(value)) or (
        isinstance(value, Image.Image) and value.size == SIZE
    )


IS_THING = {
    "prompt": lambda value: isinstance(value, str) and PROMPT in value,
    "memory limit": lambda value: type(value) in (int, str) and str(value) == str(LIMIT),
    "weight": lambda value: isinstance(value, str) and value.endswith(WEIGHT),
    "reference image": is_reference,
}


def follow(tree: Path, thing: str) -> dict[str, Any]:
    """The way of a thing in its run, and how often the run called what is counted. In a process of its own."""
    import flux2_mlx

    flux2_mlx.__path__.append(str(tree))
    from PIL import Image

    from flux2_mlx.__main__ import main

    Image.new("RGB", SIZE, "white").save(REFERENCE)
    way, calls, folders = Way(rooms(tree), IS_THING[thing]), Counter(), (f"{tree}/flux2_mlx/", f"{tree}/convert/")

    def hear(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "return":
            way.back(frame)
        elif event == "call" and path.startswith(folders) and not frame.f_code.co_name.startswith("<"):
            way.call(path.removeprefix(f"{tree}/"), frame)
            calls[frame.f_code.co_qualname] += 1

    sys.argv[1:] = THINGS[thing]
    threading.setprofile(hear)
    sys.setprofile(hear)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
    counts = {name: sum(calls[key] for key in calls if re.fullmatch(shape, key)) for name, shape in COUNTED.items()}
    return {"way": way.figures(), "calls": counts, "stays": way.stays}


def rooms(tree: Path) -> dict[str, int]:
    """The place of each room in the table of storeys; older trees have rows of rooms that are at one height."""
    for node in ast.parse((tree / "tests/test_project.py").read_text()).body:
        if isinstance(node, ast.Assign) and (name := ast.unparse(node.targets[0])) in ("STOREYS", "ROWS"):
            table = ast.literal_eval(node.value)
            rows = [(room,) for rooms in table.values() for room in rooms] if name == "STOREYS" else table
            return {room: number for number, row in enumerate(rows) for room in row}
    raise SystemExit(f"{tree}/tests/test_project.py has no STOREYS")


def lengths(values: list[int]) -> dict[str, int]:
    values = sorted(values)
    median = round(statistics.median(values))
    return {"count": len(values), "median": median, "p90": values[len(values) * 9 // 10], "maximum": values[-1]}


def read(tree: Path) -> dict[str, Any]:
    """What the sources say by themselves. A function's lines are those from its `def` on without its docstring."""
    files, functions, names = [], [], Counter()
    for path in [path for folder in ("flux2_mlx", "convert") for path in sorted((tree / folder).rglob("*.py"))]:
        text = path.read_text()
        files.append(text.count("\n"))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first, documented = node.body[0], ast.get_docstring(node) is not None
                docstring = first.end_lineno - first.lineno + 1 if documented else 0
                functions.append(node.end_lineno - node.lineno + 1 - docstring)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names[path] += node.value in NETWORKS
    literals = {"literals": names.total(), "files": sum(map(bool, names.values()))}
    return {"functions": lengths(functions), "files": lengths(files), "network names": literals}


def python(tree: Path, *arguments: str) -> str:
    """What Python prints with the packages of `tree`, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(tree), "FLUX2_MLX_HOME": folder, "HF_HOME": folder}
        environment["FLUX2_MLX_DEVICE"] = "cpu"
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def seconds(tree: Path, *arguments: str, times: int) -> float:
    """The shortest time of several runs of the command line, each in a process of its own."""
    call = functools.partial(python, tree, "-c", COMMAND, str(tree), *arguments)
    return round(min(timeit.repeat(call, number=1, repeat=times)), 2)


def mypy_errors(tree: Path) -> int | str:
    """How many errors mypy finds in a tree, or why it says nothing of that."""
    if importlib.util.find_spec("mypy") is None:
        return "mypy is not installed"
    command = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "flux2_mlx", "convert"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return found_errors(done.returncode, done.stdout, done.stderr)


def found_errors(status: int, shown: str, complaint: str) -> int | str:
    """The number of errors in what mypy has `shown`; of a run that came to no end, what it said."""
    if status == 0 and re.search(r"^Success: no issues found", shown, re.MULTILINE):
        return 0
    found = re.search(r"^Found (\d+) errors? in", shown, re.MULTILINE)
    if status == 1 and found:
        return int(found[1])
    said = [line for line in f"{shown}\n{complaint}".splitlines() if line.strip()] or ["nothing"]
    return f"failed with {status}: {said[-1]}"


def measure(tree: Path) -> dict[str, dict[str, Any]]:
    """Every figure of a tree, in groups."""
    script = [str(Path(__file__).resolve()), "--tree", str(tree), "--follow"]
    found = {thing: json.loads(python(tree, *script, thing).splitlines()[-1]) for thing in THINGS}
    ours, every = python(tree, "-c", COMMAND, str(tree), "--help").split()[-2:]
    return {
        **{f"way of the {thing}": of_thing["way"] for thing, of_thing in found.items()},
        "calls in a run": found["prompt"]["calls"],
        **read(tree),
        "modules for --help": {"ours": int(ours), "all": int(every)},
        "mypy": {"errors": mypy_errors(tree)},
        "seconds": {
            "--help": seconds(tree, "--help", times=5),
            "demo": seconds(tree, "t2i", PROMPT, "-m", "demo", "-o", "image.png", times=3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="root of the sources  [default: these]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--follow", choices=THINGS, help="only the way of this thing, stay by stay, as JSON")
    given = parser.parse_args()
    tree = given.tree.resolve()
    if given.follow:
        print(json.dumps(follow(tree, given.follow)))
        return
    figures = measure(tree)
    lines = (f"{group:24} {'  '.join(f'{name} {n}' for name, n in found.items())}" for group, found in figures.items())
    print(json.dumps(figures, indent=2) if given.json else "\n".join(lines))


if __name__ == "__main__":
    main()
