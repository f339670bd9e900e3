"""Runs that are interrupted, runs in threads, and many images in one process.

    python scripts/storm.py interrupts 100 1     # signals at so many random moments that follow from the seed
    python scripts/storm.py threads 50           # so many runs in 8 threads
    python scripts/storm.py images 300           # how much memory so many images leave behind

Exit code 1 if anything is lost, half written, or other than it was.
"""

import argparse
import gc
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from flux2_mlx.convert import Source, write_checkpoint
from PIL import Image
from tiny_model import VARIANT, write_source

from flux2_mlx import CheckpointError, Flux2Pipeline
from flux2_mlx.verification import verify

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.hub_server import HubServer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_REPO = "org/model"
_MOST_GROWTH = 5_000_000
_WARM_UP = 20
_PROMPT = "a small red circle on a blue background"


@dataclass
class Trial:
    """A command in a folder of its own."""

    folder: Path
    arguments: list[str]
    environment: dict[str, str]

    def start(self) -> subprocess.Popen:
        return self.also(*self.arguments)

    def also(self, *arguments: str) -> subprocess.Popen:
        """Start another command there."""
        command, pipe = [sys.executable, "-m", "flux2_mlx", *arguments], subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True)


class Storm:
    """What the commands need, and how what they leave behind is looked at."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._source = write_source(folder / "source")
        self._model = folder / "model"
        write_checkpoint(Source.open(self._source, VARIANT), self._model, "bf16", "bf16")
        self._hub = HubServer({_REPO: self._source})
        self._picture = folder / "in.png"
        Image.effect_noise((64, 64), 80).convert("RGB").save(self._picture)
        self.kinds: dict[str, Callable[[Path], Trial]] = {
            "t2i": self._t2i,
            "i2i": self._i2i,
            "convert": self._convert,
            "download": self._download,
        }

    def __enter__(self) -> "Storm":
        self._hub.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hub.__exit__(*exception)

    def _environment(self, home: Path) -> dict[str, str]:
        return self._hub.environment(home / "hf") | {"FLUX2_MLX_HOME": str(home / "models")}

    def _t2i(self, folder: Path) -> Trial:
        (folder / "out").mkdir()
        settings = ["-m", "demo", "-n", "24", "-W", "64", "-H", "64", "-s", "2", "--seed", "1", "-o", "out"]
        return Trial(folder, ["t2i", _PROMPT, *settings], self._environment(folder))

    def _i2i(self, folder: Path) -> Trial:
        (folder / "out").mkdir()
        settings = ["-i", str(self._picture), "-m", "demo", "-n", "12", "-s", "2", "--seed", "1", "-o", "out"]
        return Trial(folder, ["i2i", _PROMPT, *settings], self._environment(folder))

    def _convert(self, folder: Path) -> Trial:
        shutil.copytree(self._model, folder / "target")
        settings = ["-q", "bf16", "--text-quant", "bf16", "--variant", "demo", "--force"]
        return Trial(folder, ["convert", str(self._source), "target", *settings], self._environment(folder))

    def _download(self, folder: Path) -> Trial:
        settings = ["-q", "bf16", "--text-quant", "bf16", "--variant", "demo"]
        return Trial(folder, ["download", _REPO, *settings], self._environment(folder))

    def wrongs(self, kind: str, trial: Trial, stdout: str) -> Iterator[str]:
        """What is lost or half written in the folder of a trial that has ended."""
        for line in stdout.splitlines():
            if not (trial.folder / line).exists():
                yield f"{line} was named and is not there"
        for path in visible(trial.folder / "out"):
            try:
                with Image.open(path) as image:
                    image.load()
            except OSError as error:
                yield f"{path.name} is half written: {error}"
        if kind == "convert":
            # The next start brings back what a killed one had moved away.
            shown = trial.also("info", "target")
            _, stderr = shown.communicate()
            if shown.returncode:
                yield f"the model can't be used: {stderr}"
        checkpoints = [path for path in visible(trial.folder / "models") if (path / "flux2.json").exists()]
        for checkpoint in [trial.folder / "target"] if kind == "convert" else checkpoints:
            try:
                yield from map(str, verify(checkpoint).problems)
            except CheckpointError as error:
                yield str(error)
        for snapshot in (trial.folder / "hf").glob("hub/*/snapshots/*"):
            for path in filter(Path.is_file, snapshot.rglob("*")):
                if path.read_bytes() != (self._source / path.relative_to(snapshot)).read_bytes():
                    yield f"{path} is half fetched"

    def hidden(self, trial: Trial) -> list[str]:
        """What only a killed process may leave behind."""
        return sorted(str(path.relative_to(trial.folder)) for path in trial.folder.rglob(".flux2-mlx-*"))


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith(".")) if folder.is_dir() else []


def interrupts(count: int, seed: int) -> list[str]:
    """Send a signal at `count` random moments; gives what went wrong."""
    rng, bad, codes = random.Random(seed), [], Counter()
    with tempfile.TemporaryDirectory(prefix="flux2-storm-") as scratch, Storm(Path(scratch)) as storm:
        seconds = {kind: _seconds(storm, kind) for kind in storm.kinds}
        print("seconds of a whole run:", {kind: round(taken, 2) for kind, taken in seconds.items()}, flush=True)
        for number in range(count):
            kind, sent = list(storm.kinds)[number % len(storm.kinds)], rng.choice(SIGNALS)
            moment = rng.uniform(0.02, 1.02) * seconds[kind]
            code, wrongs = _interrupt(storm, kind, sent, moment)
            codes[kind, sent.name, code] += 1
            bad += [f"seed {seed} number {number}: {kind}, {sent.name} after {moment:.3f} s: {x}" for x in wrongs]
    for (kind, name, code), times in sorted(codes.items()):
        print(f"{kind:9} {name:8} exit code {code:4}: {times}")
    return bad


def _seconds(storm: Storm, kind: str) -> float:
    """How long a whole run takes."""
    folder = storm.folder / "whole"
    folder.mkdir()
    trial = storm.kinds[kind](folder)
    began = time.perf_counter()
    process = trial.start()
    stdout, stderr = process.communicate()
    taken = time.perf_counter() - began
    wrongs = [*storm.wrongs(kind, trial, stdout), *storm.hidden(trial)]
    if process.returncode or wrongs:
        raise RuntimeError(f"{kind} fails without a signal: {stderr} {wrongs}")
    shutil.rmtree(folder)
    return taken


def _interrupt(storm: Storm, kind: str, number: signal.Signals, moment: float) -> tuple[int, list[str]]:
    """The exit code of a run that gets a signal, and what is wrong after it."""
    folder = storm.folder / "trial"
    folder.mkdir()
    trial = storm.kinds[kind](folder)
    process = trial.start()
    time.sleep(moment)
    process.send_signal(number)
    try:
        stdout, stderr = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        return process.returncode, ["it did not end"]
    # Before our first module and after our last a signal does what Python does by itself; for a shell -number is the
    # same exit code.
    expected = {0, -number, 128 + number}
    early = not re.search(r"flux2_mlx/(?!__init__\.py|errors\.py)", stderr)
    wrongs = []
    if "Traceback" in stderr and not early:
        wrongs.append(f"a traceback: {stderr}")
    elif process.returncode not in expected and not (early and "Traceback" in stderr):
        wrongs.append(f"exit code {process.returncode}: {stderr}")
    if number != signal.SIGKILL and storm.hidden(trial):
        wrongs.append(f"left behind: {storm.hidden(trial)}")
    wrongs += storm.wrongs(kind, trial, stdout)
    if number == signal.SIGKILL:
        again = trial.also(*trial.arguments, *(["--force"] if kind in ("t2i", "i2i") else []))
        stdout, stderr = again.communicate()
        if again.returncode:
            wrongs.append(f"a second run fails: {stderr}")
        wrongs += [f"after a second run: {wrong}" for wrong in storm.wrongs(kind, trial, stdout)]
    shutil.rmtree(folder)
    return process.returncode, wrongs


def threads(count: int) -> list[str]:
    """Run in 8 threads what also runs alone; gives the runs that differ. The process must end by itself after it."""
    shared = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)

    def run(number: int, pipe: Flux2Pipeline = shared) -> bytes:
        image = pipe(_PROMPT, width=64, height=64, num_inference_steps=2, seed=number % 5).images[0]
        return image.tobytes()

    def run_anew(number: int) -> bytes:
        return run(number, Flux2Pipeline.from_pretrained("demo", prompt_cache=False) if number % 2 else shared)

    right = [run(number) for number in range(5)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run_anew, range(count)))
    wrong = [f"run {number} in a thread gave other pixels" for number, x in enumerate(found) if x != right[number % 5]]
    print(f"{count} runs in 8 threads, {len(wrong)} with other pixels")
    return wrong


def images(count: int) -> list[str]:
    """Make images in one process and tell how much it grows."""
    pipe, before = Flux2Pipeline.from_pretrained("demo", prompt_cache=False), 0
    for number in range(_WARM_UP + count):
        if number == _WARM_UP:
            before = _held()
        pipe(_PROMPT, width=32, height=32, num_inference_steps=1, seed=number)
    grown = _held() - before
    print(f"{count} images: the process grew by {grown / 1e6:.2f} MB; MLX holds {mx.get_active_memory()} bytes")
    return [f"it grew by {grown / 1e6:.2f} MB"] if grown > _MOST_GROWTH else []


def _held() -> int:
    """Bytes of memory that this process has; where the system does not tell, the most that it has had."""
    gc.collect()
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["interrupts", "threads", "images"])
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    given = parser.parse_args()
    bad = interrupts(given.count, given.seed) if given.what == "interrupts" else globals()[given.what](given.count)
    print(*bad, f"{len(bad)} wrong", sep="\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
