"""Damage whatever the program reads in COUNT ways that follow from SEED, and print how often each outcome was.

    python scripts/fuzz.py 10000 1
    python scripts/fuzz.py 1 1 --first 4711          # one case again
    python scripts/fuzz.py 500 1 --kinds header,cache
    python scripts/fuzz.py 1000 1 --module fuzz_formats --kinds gguf

Cases run in a process of their own, which is started again after a crash or a hang. Exit code 1 if there was any of
what must never be: see BAD.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

BAD = {
    "traceback": "an exception that is none of the library's",
    "unclear": "an error of several lines, or of more than a line may have",
    "silent": "other pixels, or other content, and nothing that tells",
    "leftover": "something half made is left behind",
    "memory": "more memory than twice the input and MEMORY",
    "crash": "the process died",
    "hang": "no end within the time limit",
}
MEMORY = 16 << 20  # what the smallest healthy run may take: networks of a megabyte, what they compute, a command line
SECONDS = 30  # of one case; usual ones take a fiftieth of a second
_START_SECONDS = 120
_ADDRESS_SPACE = 8 << 30  # what a worker may have at most, so that no case takes the machine with it
_HERE = Path(__file__).resolve().parent


class Result(NamedTuple):
    """What came of a case; `detail` says where and why."""

    case: int
    kind: str
    outcome: str
    detail: str = ""


class Finding(Exception):  # noqa: N818 (it is what is looked for)
    """Raised by a case for an outcome of its own."""


def survey(
    count: int, seed: int, *, first: int = 0, kinds: str = "", module: str = "fuzz_cases", seconds: float = SECONDS
) -> Iterator[Result]:
    """The results of `count` cases from number `first` on."""
    case, end = first, first + count
    while case < end:
        for result in _worker(case, end, seed, kinds, module, seconds):
            yield result
            case = result.case + 1


def _worker(first: int, end: int, seed: int, kinds: str, module: str, seconds: float) -> Iterator[Result]:
    """The results of one process up to its end, or to the case that ends it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(end - first), str(seed)]
    command += ["--worker", "--first", str(first), "--module", module, "--kinds", kinds]
    with (
        tempfile.TemporaryDirectory(prefix="flux2-fuzz-") as scratch,
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=scratch, env=environment) as process,
    ):
        begun, lines = None, _Lines(process.stdout.fileno())
        try:
            while line := lines.next(_START_SECONDS if begun is None else seconds):
                message = json.loads(line)
                begun = message if len(message) == 2 else None
                if begun is None:
                    yield Result(*message)
        except TimeoutError:
            if begun is None:
                raise
            yield Result(*begun, "hang", f"no end after {seconds} s")
            return
        finally:
            if begun is not None or sys.exc_info()[0]:
                process.kill()
        code = process.wait()
        if begun is not None:
            yield Result(*begun, "crash", f"exit code {code}; {_tail(errors)}")
        elif code:
            raise RuntimeError(f"a worker ended with {code}: {_tail(errors)}")


def _tail(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
    return errors.read().decode(errors="replace")


class _Lines:
    """Lines that come from a pipe."""

    def __init__(self, descriptor: int):
        self._descriptor, self._pending = descriptor, b""

    def next(self, seconds: float) -> bytes:
        """The next line, and none at the end; TimeoutError when there is none for so long."""
        while b"\n" not in self._pending:
            if not select.select([self._descriptor], [], [], seconds)[0]:
                raise TimeoutError
            data = os.read(self._descriptor, 65536)
            if not data:
                return b""
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line


def work(count: int, seed: int, first: int, kinds: str, module: str) -> None:
    """Run cases, and write of each a line before it and a line after it."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is none of these lines
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE,) * 2)
    bench = importlib.import_module(module).Bench(Path.cwd())
    gc.freeze()  # or each phase of each run would look through all that is imported for garbage
    names = [name for name in bench.kinds if not kinds or name in kinds.split(",")]
    for case in range(first, first + count):
        rng = random.Random(f"{seed}/{case}")
        kind = rng.choice(names)
        print(json.dumps([case, kind]), file=out)
        print(json.dumps([case, kind, *judge(bench, kind, rng)]), file=out)


def judge(bench: Any, kind: str, rng: random.Random) -> tuple[str, str]:
    """The outcome of a case, and where it came from."""
    from flux2_mlx.errors import Flux2Error

    bench.size = 0
    before = _reset_peak()
    try:
        outcome, detail = bench.kinds[kind](rng), ""
    except Flux2Error as error:
        outcome, detail = ("refused" if is_one_line(str(error)) else "unclear"), str(error)
    except Finding as finding:
        outcome, detail = str(finding.args[0]), str(finding.args[1])
    except KeyboardInterrupt:
        raise
    except MemoryError:
        outcome, detail = "memory", traceback.format_exc()
    except BaseException as error:  # a panic of a Rust library is no Exception
        frames = traceback.extract_tb(error.__traceback__)
        places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-6:-1])
        outcome, detail = "traceback", f"{type(error).__name__}: {error} at {places}"
    taken = _peak() - before
    bench.restore()
    if outcome not in BAD and taken > MEMORY + 2 * bench.size:
        return "memory", f"{taken >> 20} MiB for {bench.size >> 10} KiB; {outcome} {detail}"
    return outcome, detail[:2000]


def is_one_line(message: str, most: int = 10_000) -> bool:
    return len(message.splitlines()) == 1 and len(message) <= most


def _reset_peak() -> int:
    """Forget the most memory that this process has had, where the system can, and give what it has now.

    What it has freed goes back to the system first, or it would hide as much of what the next case takes.
    """
    if sys.platform == "linux":
        import mlx.core as mx

        mx.clear_cache()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    if sys.platform == "linux":
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--kinds", default="", help="only these, with commas between; the cases are then others")
    parser.add_argument(
        "--module", default="fuzz_cases", help="what cases are of: fuzz_cases, fuzz_formats or fuzz_adapters"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="print every case")
    given = parser.parse_args()
    if given.worker:
        work(given.count, given.seed, given.first, given.kinds, given.module)
        return 0
    counts: dict[str, Counter] = {}
    for result in survey(given.count, given.seed, first=given.first, kinds=given.kinds, module=given.module):
        counts.setdefault(result.kind, Counter())[result.outcome] += 1
        if given.verbose or result.outcome in BAD:
            print(f"seed {given.seed} case {result.case} {result.kind}: {result.outcome}: {result.detail}", flush=True)
    total = sum(counts.values(), Counter())
    for kind, found in [*sorted(counts.items()), ("all", total)]:
        print(f"{kind:12}", ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items())))
    return int(bool(total.keys() & BAD.keys()))


if __name__ == "__main__":
    sys.path.insert(0, str(_HERE))
    sys.path.append(str(_HERE.parent / "tests"))
    import fuzz  # this very file, under the name that cases import it by

    sys.exit(fuzz.main())
