"""Convert a transformer of random weights in several forms, beside copying the same bytes. For Linux.

    python scripts/bench_convert.py                        # two gigabytes of klein-4b's layers
    python scripts/bench_convert.py --blocks 5 20 --forms bf16:bf16

What is printed of a form: gigabytes of the source a second as `cp` copies them, and as they are converted; where that
time goes, by doing its steps one more at a time; and the most memory beyond the largest tensor in float32. Each form is
written into a temporary folder first, which needs as much space again for the result.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from flux2_mlx.convert import Source, assembled, write_checkpoint
from flux2_mlx.convert.assembly import _loose_parts
from flux2_mlx.convert.lora import Folds
from flux2_mlx.convert.write import _checked_plans, _part

from flux2_mlx.checkpoint import Component
from flux2_mlx.config import VARIANTS
from flux2_mlx.store import demo_folder
from flux2_mlx.weights import Files, TensorInfo, evaluated, write_safetensors

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
    return replace(base, configs=configs, parts=_loose_parts(path, None), stored=stored)


def steps(path: Path, component: Component, quant: str, target: Path) -> dict[str, Callable[[], None]]:
    """What a conversion does, each with all before it."""
    source = opened(path, component)
    (plan,) = _checked_plans(source, quant, "bf16")
    tensors, part = source.parts["transformer"].tensors, _part(source, plan, Folds((), {}))
    raw = Files([path]) if path.suffix == ".safetensors" else None

    def result() -> Iterator[memoryview]:
        for array in evaluated(part.tensors.read(part.tensors.infos)):
            yield np.ascontiguousarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).data

    def written() -> None:
        with target.open("wb") as file:
            for data in result():
                file.write(data)
            os.fsync(file.fileno())

    done = {"reading": lambda: each(raw) if raw else path.read_bytes()}
    done["dequantizing"] = lambda: each(tensors)
    done["rounding, checking, quantizing"] = lambda: [None for _ in result()]
    done["hashing twice"] = lambda: [(sha256(data).digest(), sha256(data).digest()) for data in result()]
    return done | {"writing": written}


def each(tensors: object) -> None:
    for _ in evaluated(tensors.read(tensors.infos)):
        pass


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def convert(path: Path, component: Component, quant: str, target: Path) -> None:
    """Convert alone, and print the seconds and the bytes that were taken most."""
    source, before = opened(path, component), resident("VmRSS")
    seconds = timed(lambda: write_checkpoint(source, target, quant, "bf16"))
    print(seconds, resident("VmHWM") - before)


def resident(what: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def measured(form: str, blocks: tuple[int, int], folder: Path) -> None:
    component, tensors = shapes(blocks)
    kind, quant = form.split(":")
    path, target = folder / ("a.gguf" if kind == "gguf" else "a.safetensors"), folder / "made"
    write_source(kind, path, tensors)
    os.sync()
    size, largest = path.stat().st_size, 4 * max(int(np.prod(shape)) for shape in tensors.values())
    copying = timed(lambda: (shutil.copyfile(path, folder / "copy"), os.sync()))
    (folder / "copy").unlink()
    took = {name: timed(step) for name, step in steps(path, component, quant, folder / "written").items()}
    (folder / "written").unlink()
    command = [sys.executable, __file__, "--blocks", *map(str, blocks), "--convert", str(path), quant, str(target)]
    seconds, most = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    shutil.rmtree(target)
    print(f"{kind} to {quant}: {size / 1e9:.2f} GB, copied at {size / copying / 1e9:.2f} GB/s, converted at ", end="")
    print(f"{size / seconds / 1e9:.2f} GB/s ({seconds:.0f} s)")
    quantizing = took["rounding, checking, quantizing"]
    parts = {
        "reading": took["reading"],
        "dequantizing": took["dequantizing"] - took["reading"],
        "rounding, checking, quantizing": quantizing - took["dequantizing"],
        "hashing twice": took["hashing twice"] - quantizing,
        "writing": took["writing"] - quantizing,
    }
    print("  " + ", ".join(f"{name} {value:.1f} s" for name, value in parts.items()))
    print(f"  most memory {most / 2**30:.2f} GiB, {(most - largest) / 2**30:+.2f} GiB beyond the largest tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 4), help="double and single ones; klein-4b has 5 20")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
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
            measured(form, blocks, Path(folder))


if __name__ == "__main__":
    main()
