"""Plan and measure the memory of whole runs.

    python scripts/bench_memory.py table --readme README.md
    python scripts/bench_memory.py measure klein-4b bf16 --work FOLDER --side 1024 --steps 1 --limit 5.6GiB

`table` writes what making one image of 1024×1024 takes with every model and quantization, between the two marks in the
file. `measure` writes a checkpoint of random weights at full size into FOLDER, unless it is there already, runs it, and
prints what every phase took beside its plan.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from flux2_mlx.convert.write import write_safetensors
from tokenizers import Tokenizer, models

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import FORMAT_VERSION, MANIFEST, Component, TensorInfo, module_tensors, variant_components
from flux2_mlx.config import QUANTIZATIONS, VARIANTS
from flux2_mlx.memory import Plan, Workload, parse_memory, plan
from flux2_mlx.phases import Flux2Output, measured
from flux2_mlx.streaming import footprint
from flux2_mlx.text import TOKENIZERS

# GiB that a Swift port of these models documents for 1024×1024.
DOCUMENTED = {
    ("klein-4b", "bf16"): 5.6,
    ("klein-4b", "qint8"): 3.8,
    ("klein-9b", "bf16"): 20,
    ("dev", "bf16"): 60,
    ("dev", "qint8"): 32,
    ("dev", "qint4"): 16,
}
MARKS = "<!-- memory -->\n", "<!-- end of memory -->\n"
GIB = 2**30
VALUES = 2**20


def planned(variant: str, quant: str, limit: float, dtype: mx.Dtype = mx.bfloat16) -> Plan:
    """The plan of one 1024×1024 image within `limit` bytes."""
    model = VARIANTS[variant]
    networks = {name: footprint(part, dtype) for name, part in variant_components(model, quant).items()}
    return plan(model, networks, Workload(1024, 1024, model.max_sequence_length), dtype, int(limit))


def table() -> str:
    """Markdown: peaks in GiB of a run in bfloat16 with all weights in memory, within the documented figure, and with
    as little as a run can have."""
    rows = [
        "| model | weights | all in memory | documented elsewhere | within that | at least |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, variant in VARIANTS.items():
        if not variant.repo:
            continue
        for quant in QUANTIZATIONS:
            figure = DOCUMENTED.get((name, quant))
            within = planned(name, quant, figure * GIB) if figure else None
            peaks = [planned(name, quant, limit).peak_memory / GIB for limit in (2**50, 0)]
            middle = f"{figure} | {within.peak_memory / GIB:.1f}" if within else "– | –"
            rows.append(f"| `{name}` | {quant} | {peaks[0]:.1f} | {middle} | {peaks[1]:.1f} |")
    return "\n".join(rows) + "\n"


def write_table(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"(?<={re.escape(MARKS[0])}).*?(?={re.escape(MARKS[1])})", re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"{path} has no marks {MARKS[0].strip()} and {MARKS[1].strip()}")
    path.write_text(pattern.sub(lambda _: f"\n{table()}\n", text), encoding="utf-8")


def make_checkpoint(folder: Path, variant: str, quant: str, text_quant: str) -> None:
    """An MLX checkpoint of random weights at full size, without what only generating text needs."""
    parts = variant_components(VARIANTS[variant], quant, text_quant)
    for name in ("transformer", "text_encoder", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_component(folder / name, parts[name])
    write_tokenizer(folder / "tokenizer", VARIANTS[variant].text.model_type)
    manifest = {
        "format_version": FORMAT_VERSION,
        "variant": variant,
        "quantization": {"transformer": quant, "text_encoder": text_quant},
        "source": {"repo": "random weights"},
        "components": ["transformer", "text_encoder", "vae"],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def write_tokenizer(folder: Path, family: str) -> None:
    """One that knows only what it must; the prompts of a run are random tokens."""
    kind, tokenizer = TOKENIZERS[family], Tokenizer(models.BPE())
    tokenizer.add_special_tokens([kind.pad, *kind.ends])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_component(folder: Path, part: Component) -> None:
    config = part.config.to_dict() | ({"quantization": part.quantization} if part.quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    tensors = module_tensors(part.build())
    bits = (part.quantization or {}).get("bits")
    write_safetensors(folder / "model.safetensors", tensors, random_arrays(tensors, bits), lambda count: None)


def random_arrays(tensors: dict[str, TensorInfo], bits: int | None) -> Iterator[mx.array]:
    """Values about 0.02, ones for norms and variances, and packed ones that stand for values in −0.03..0.03."""
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 0.02, VALUES).astype(np.float32)
    packed = rng.integers(0, 2**32, VALUES, dtype=np.uint32)
    for name, tensor in tensors.items():
        if tensor.dtype == "U32":
            yield mx.array(np.resize(packed, tensor.shape))
        elif bits and name.endswith((".scales", ".biases")):
            value = 0.06 / (2**bits - 1) if name.endswith(".scales") else -0.03
            yield mx.full(tensor.shape, value, dtype=mx.bfloat16)
        elif len(tensor.shape) == 1 and name.endswith(("weight", "scale", "running_var")):
            yield mx.ones(tensor.shape, dtype=mx.bfloat16)
        else:
            yield mx.array(np.resize(normal, tensor.shape)).astype(mx.bfloat16)


def run(pipe: Flux2Pipeline, side: int, steps: int, length: int) -> tuple[Flux2Output, Plan]:
    """One image from random tokens, since the weights have no tokenizer of their own."""
    request = pipe.request([""], width=side, height=side, steps=steps, seed=0, max_sequence_length=length)
    networks, output = pipe.networks, Flux2Output()
    whole = networks.checked_plan(request, pipe.edit([]))
    with measured("text_encoder", output.timings, whole, networks.reading):
        ids = np.random.default_rng(0).integers(1000, size=(1, length))
        encoder = networks.load("text_encoder", whole)
        states = encoder(mx.array(ids), mx.array(np.arange(length)[None] < max(1, length - 4)))
        mx.eval(states)
        del encoder
    made = pipe.run(request, prompt_embeds=states, output_type="np")
    made.timings[:1] = output.timings
    return made, whole


def measure(arguments: argparse.Namespace) -> None:
    folder = arguments.work / f"{arguments.variant}-{arguments.quant}-{arguments.text_quant}"
    if not (folder / MANIFEST).exists():
        make_checkpoint(folder, arguments.variant, arguments.quant, arguments.text_quant)
    limit = arguments.limit and parse_memory(arguments.limit)
    pipe = Flux2Pipeline.from_pretrained(folder, dtype=arguments.dtype, memory_limit=limit, prompt_cache=False)
    output, whole = run(pipe, arguments.side, arguments.steps, arguments.length)
    print(
        f"{arguments.variant} {arguments.quant}, text encoder {arguments.text_quant}, {pipe.dtype}, {arguments.side}²"
    )
    print(f"{'phase':14}{'seconds':>9}{'peak GiB':>10}{'planned':>9}{'ratio':>7}{'read a pass':>13}{'overlap':>9}")
    for took in output.timings:
        peak, expected = took.peak_memory / GIB, whole.phase(took.name).peak_memory / GIB
        print(f"{took.name:14}{took.seconds:9.1f}{peak:10.3f}{expected:9.3f}{expected / peak:7.3f}", end="")
        print(f"{took.streamed / GIB:13.3f}{took.overlap:9.0%}" if took.read else "")
    image = np.ascontiguousarray(output.images)
    digest = hashlib.sha256(image.tobytes()).hexdigest()[:16]
    print(f"whole run: {output.peak_memory / GIB:.3f} GiB; image {digest}, finite: {bool(np.isfinite(image).all())}")


def main(words: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("table")
    command.add_argument("--readme", type=Path, help="write it there; default: print it")
    command.set_defaults(run=lambda given: write_table(given.readme) if given.readme else print(table(), end=""))
    command = commands.add_parser("measure")
    command.add_argument("variant", choices=[name for name, variant in VARIANTS.items() if variant.repo])
    command.add_argument("quant", choices=QUANTIZATIONS)
    command.add_argument("--text-quant", choices=QUANTIZATIONS, default="bf16")
    command.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    command.add_argument("--side", type=int, default=64, help="pixels")
    command.add_argument("--steps", type=int, default=1)
    command.add_argument("--length", type=int, default=512, help="text tokens")
    command.add_argument("--limit", help="of memory, such as 3GiB")
    command.add_argument("--dtype", default="float32")
    command.set_defaults(run=measure)
    arguments = parser.parse_args(words)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
