"""Convert a transformer of random weights in several forms, beside copying the same bytes. For Linux.

    python scripts/bench_convert.py                        # two gigabytes of klein-4b's layers
    python scripts/bench_convert.py --blocks 5 20 --forms bf16:bf16 --rounds 5

What is printed of a form: gigabytes of the source a second as `cp` copies them, and as they are converted, in turns,
each the median by the clock and what that took of processors, since of a busy machine the clock tells little; the ratio
of the two, with the least and the greatest of a round; what the steps take alone; and the most memory beyond the
largest tensor in float32. Both end when all is on the disk. Each form is written into a temporary folder first, which
needs as much space again for the result.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import gguf
import mlx.core as mx
import numpy as np
from flux2_mlx.convert import Source, assembled, formats, write_checkpoint
from flux2_mlx.convert.configs import Stated
from flux2_mlx.convert.sources import parts_of

from flux2_mlx.checkpoint import Component
from flux2_mlx.config import VARIANTS
from flux2_mlx.store import demo_folder
from flux2_mlx.weights import TensorInfo, Tensors, evaluated, write_safetensors

FORMS = ("bf16:bf16", "fp8:qint8", "gguf:qint4")
Q4_K = gguf.GGMLQuantizationType.Q4_K
SCALE = b"\x1f\x21"  # about 0.01 in half precision


def shapes(blocks: tuple[int, int]) -> tuple[Component, dict[str, tuple[int, ...]]]:
    """A transformer of klein-4b's width with so many blocks of each kind, and its tensors in the original naming."""
    config = replace(VARIANTS["klein-4b"].transformer, num_layers=blocks[0], num_single_layers=blocks[1])
    component = Component("transformer", config, None, ())
    return component, {name: info.shape for name, info in component.infos.items()}


def bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    """Numbers of either sign, about 0.01."""
    bits = rng.integers(0, 2**16, shape, np.uint16) & 0x80FF | 0x3C00
    return mx.array(bits).view(mx.bfloat16)


def write_source(form: str, path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    if form == "gguf":
        return write_gguf(rng, path, tensors)
    infos, arrays = {}, []
    for name, shape in tensors.items():
        if form == "fp8" and len(shape) == 2:
            infos[name] = TensorInfo("F8_E4M3", shape)
            infos[name.removesuffix("weight") + "weight_scale"] = TensorInfo("F32", (1,))
            arrays += [lambda shape=shape: mx.array(rng.integers(0, 0x7E, shape, np.uint8)), lambda: mx.array([1e-4])]
        else:
            infos[name] = TensorInfo("BF16", shape)
            arrays.append(lambda shape=shape: bfloat16(rng, shape))
    write_safetensors(path, infos, (make() for make in arrays), {}, lambda count: None)
    return None


def write_gguf(rng: np.random.Generator, path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Matrices as Q4_K where their rows are of whole blocks, the rest in float32."""
    values, nbytes = gguf.GGML_QUANT_SIZES[Q4_K]
    writer = gguf.GGUFWriter(path, "flux")
    packed = {name: len(shape) == 2 and shape[1] % values == 0 for name, shape in tensors.items()}
    for name, shape in tensors.items():
        if packed[name]:
            rows = (shape[0], shape[1] // values * nbytes)
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), raw_dtype=Q4_K)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors.items():
        if not packed[name]:
            writer.write_tensor_data(rng.random(shape, np.float32) * np.float32(0.02))
            continue
        blocks = rng.integers(0, 256, (shape[0] * shape[1] // values, nbytes), np.uint8)
        blocks[:, :4] = np.frombuffer(2 * SCALE, np.uint8)
        writer.write_tensor_data(blocks)
    writer.close()


def opened(path: Path, component: Component) -> Source:
    """A model with the transformer of a file; the rest is the built-in one's."""
    base = assembled(demo_folder(), {})
    stored = {name: part for name, part in base.stored.items() if name != "transformer"}
    configs = {**base.configs, "transformer": component.config}
    return replace(base, configs=configs, parts=parts_of(path, [path], Stated(), list), stored=stored)


def steps(path: Path, made: Path) -> dict[str, Callable[[], object]]:
    """What a conversion does, each by itself, of this source and this result."""
    tensors, _ = formats.plain([path])
    return {
        "reading": path.read_bytes,
        "reading and dequantizing": lambda: each(tensors),
        "hashing twice": lambda: [sha256(made.read_bytes()).digest() for _ in range(2)],
    }


def each(tensors: Tensors) -> None:
    for _ in evaluated(tensors.read(tensors.infos)):
        pass


class Taken(NamedTuple):
    """Seconds by the clock, and of all processors."""

    seconds: float
    processors: float

    @classmethod
    def by(cls, work: Callable[[], object]) -> "Taken":
        start, before = time.perf_counter(), time.process_time()
        work()
        return cls(time.perf_counter() - start, time.process_time() - before)

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.processors:.1f} of processors"


def convert(path: Path, component: Component, quant: str, target: Path) -> None:
    """Convert alone, and print the seconds and the bytes that were taken most."""
    source, before = opened(path, component), resident("VmRSS")
    taken = Taken.by(lambda: write_checkpoint(source, target, quant, "bf16"))
    print(*taken, resident("VmHWM") - before)


def resident(what: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def copy(path: Path, target: Path) -> None:
    shutil.copyfile(path, target)
    with target.open("rb+") as made:
        os.fsync(made.fileno())


def converted(command: list[str], target: Path) -> tuple[Taken, float]:
    """A conversion by another process, and the bytes that it took most."""
    shutil.rmtree(target, ignore_errors=True)
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    seconds, processors, most = map(float, printed)
    return Taken(seconds, processors), most


def median(values: list[Taken]) -> Taken:
    return sorted(values)[len(values) // 2]


def measured(form: str, blocks: tuple[int, int], folder: Path, rounds: int) -> None:
    _, tensors = shapes(blocks)
    kind, quant = form.split(":")
    path, target = folder / ("a.gguf" if kind == "gguf" else "a.safetensors"), folder / "made"
    write_source(kind, path, tensors)
    size, largest = path.stat().st_size, 4 * max(int(np.prod(shape)) for shape in tensors.values())
    command = [sys.executable, __file__, "--blocks", *map(str, blocks), "--convert", str(path), quant, str(target)]
    copying, converting, taken = [], [], []
    for _ in range(rounds):
        copying.append(Taken.by(lambda: copy(path, folder / "copy")))
        (folder / "copy").unlink()
        one, most = converted(command, target)
        converting.append(one)
        taken.append(most)
    print(f"{kind} to {quant}: {size / 1e9:.2f} GB")
    for name, x in {"copied": median(copying), "converted": median(converting)}.items():
        print(f"  {name} at {size / x.seconds / 1e9:.2f} GB/s: {x}")
    ratios = [a.seconds / b.seconds for a, b in zip(copying, converting, strict=True)]
    ratio = median(copying).seconds / median(converting).seconds
    print(f"  {ratio:.2f} of copying's speed, {min(ratios):.2f} to {max(ratios):.2f} by rounds")
    made = next((target / "transformer").glob("*.safetensors"))
    for name, step in steps(path, made).items():
        print(f"  {name}: {Taken.by(step)}")
    most = max(taken)
    print(f"  most memory {most / 2**30:.2f} GiB, {(most - largest) / 2**30:+.2f} GiB beyond the largest tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 4), help="double and single ones; klein-4b has 5 20")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is copied and converted")
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder if not given")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    blocks = tuple(given.blocks)
    if given.convert:
        path, quant, target = given.convert
        convert(Path(path), shapes(blocks)[0], quant, Path(target))
        return
    for form in given.forms:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            measured(form, blocks, Path(folder), given.rounds)


if __name__ == "__main__":
    main()
