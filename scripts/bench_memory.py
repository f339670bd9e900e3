"""Plan and measure the memory of whole runs.

    python scripts/bench_memory.py table --readme README.md
    python scripts/bench_memory.py measure klein-4b bf16 --work FOLDER --side 1024 --steps 1 --limit 5.6GiB

`table` writes what making one image of 1024×1024 takes with every model and quantization, what recorded runs took, and
what fits into the default limit of Macs, between the two marks in the file. `measure` writes a checkpoint of random
weights at full size into FOLDER, unless it is there already, runs it, prints what every phase took beside its plan, and
records that with `--record`.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, models

from flux2_mlx import Flux2Pipeline
from flux2_mlx.advice import workload
from flux2_mlx.checkpoint import FORMAT_VERSION, MANIFEST, Component, variant_components
from flux2_mlx.config import QUANTIZATIONS, VARIANTS
from flux2_mlx.device import mac_limit, parse_memory
from flux2_mlx.memory import Plan
from flux2_mlx.networks import Networks
from flux2_mlx.output import Phase
from flux2_mlx.quantization import bits_of
from flux2_mlx.request import Request
from flux2_mlx.text import TOKENIZERS
from flux2_mlx.weights import TensorInfo, write_safetensors

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
RECORD = Path(__file__).with_suffix(".json")
PHASES = ("text_encoder", "transformer", "vae")
SETTINGS = ("quant", "text_quant", "side", "length", "steps", "dtype", "limit")
RUNS = "Really run with random weights at full size, in float32 on a Linux CPU; GiB, measured / planned:"
LIMITS = (
    "The default limit of Macs by their memory, in GiB, and what becomes of a transformer in it for an image of "
    "1024×1024 in 16 bits: in memory, or read from disk at every step, so many GiB:"
)
REASONS = (
    "All that a run has is wired, so that it is never paged out, and Macs of 16 GiB froze where that was all that "
    "Metal recommends, which is two thirds of the memory, and three quarters from 36 GiB on. So the system keeps 4 GiB "
    "of 8, 6 of 16, and 8 from 24 GiB on, where Metal recommends no more than that leaves."
)
MACS, MODELS = (8, 16, 24, 36, 64, 96, 128, 192), ("klein-4b", "klein-9b", "dev")
COLUMNS = ("bf16", "qint8", "qint4")  # of the table of Macs, which all would make too wide
VALUES = 2**20


def planned(variant: str, quant: str, limit: float) -> Plan:
    """The plan of one 1024×1024 image in bfloat16 within `limit` bytes."""
    model = VARIANTS[variant]
    networks = Networks.open(model, quant=quant, dtype="bfloat16")
    return networks.needs(workload(Request.checked(model, model.vae.token_size, [""]))).plan(int(limit))


def table() -> str:
    """Markdown: peaks in GiB of a run in bfloat16 with all weights in memory, within the documented figure (planned,
    and measured where a run is recorded), and with as little as a run can have."""
    rows = [
        "| model | weights | all in memory | documented elsewhere | within that | measured | at least |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    measured = {(row["model"], row["quant"]): whole_peak(row) for row in recorded() if row["side"] == 1024}
    for name, variant in VARIANTS.items():
        if not variant.repo:
            continue
        for quant in QUANTIZATIONS:
            figure = DOCUMENTED.get((name, quant))
            within = planned(name, quant, figure * GIB).peak_memory / GIB if figure else None
            whole, least = (planned(name, quant, limit).peak_memory / GIB for limit in (2**50, 10**6))
            cells = [whole, figure, within, measured.get((name, quant)), least]
            shown = [f"{x:.1f}" if isinstance(x, float) else str(x or "–") for x in cells]
            rows.append(f"| `{name}` | {quant} | {' | '.join(shown)} |")
    return "\n".join(rows) + "\n"


def runs_table() -> str:
    """Markdown: what recorded runs took, phase by phase, measured / planned, in GiB."""
    rows = [
        "| model | weights | image | limit | text encoder | transformer | VAE | read a pass |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in recorded():
        phases = [f"{row['phases'][name]['peak']:.2f} / {row['phases'][name]['planned']:.2f}" for name in PHASES]
        read = " + ".join(f"{row['phases'][name]['streamed']:.1f}" for name in PHASES[:2]) if row["limit"] else "–"
        rows.append(
            f"| `{row['model']}` | {row['quant']}, text {row['text_quant']} | {row['side']}² | {row['limit'] or '–'} | "
            f"{' | '.join(phases)} | {read} |"
        )
    return "\n".join(rows) + "\n"


def limits_table() -> str:
    """Markdown: of Macs with so much memory, what networks can have by default, and which models fit into that for an
    image of 1024×1024: in memory, or what a step reads from disk, in GiB."""
    names = [f"{name} {quant}" for name in MODELS for quant in COLUMNS]
    rows = [
        "| Mac | limit | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|--:|--:|" + "--:|" * len(names),
    ]
    for gibibytes in MACS:
        limit = mac_limit(gibibytes * GIB, recommended(gibibytes * GIB))
        cells = [fit(name, quant, limit) for name in MODELS for quant in COLUMNS]
        rows.append(f"| {gibibytes} | {limit / GIB:.1f} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def recommended(whole: int) -> int:
    """Bytes that Metal recommends of a Mac's memory: two thirds, and three quarters from 36 GiB on."""
    return whole * 2 // 3 if whole < 36 * GIB else whole * 3 // 4


def fit(variant: str, quant: str, limit: int) -> str:
    plan = planned(variant, quant, limit)
    if not plan.fits:
        return "–"
    streamed = plan.phase("transformer").streamed
    return f"{streamed / GIB:.1f}" if streamed else "in memory"


def recorded() -> list[dict[str, Any]]:
    """The runs of `measure --record`."""
    return json.loads(RECORD.read_text())


def whole_peak(row: dict[str, Any]) -> float:
    return max(phase["peak"] for phase in row["phases"].values())


def tables() -> str:
    return f"{table()}\n{RUNS}\n\n{runs_table()}\n{LIMITS}\n\n{limits_table()}\n{REASONS}\n"


def write_tables(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"(?<={re.escape(MARKS[0])}).*?(?={re.escape(MARKS[1])})", re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"{path} has no marks {MARKS[0].strip()} and {MARKS[1].strip()}")
    path.write_text(pattern.sub(lambda _: f"\n{tables()}\n", text), encoding="utf-8")


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
    """One that knows one letter and what it must, which is enough for the empty prompt."""
    kind, tokenizer = TOKENIZERS[family], Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens(list(dict.fromkeys((*kind.named.values(), *kind.ends, *kind.chat_tokens))))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_component(folder: Path, part: Component) -> None:
    config = part.config.to_dict() | ({"quantization": part.quantization} if part.quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    tensors = part.infos
    write_safetensors(
        folder / "model.safetensors", tensors, random_arrays(tensors, part.quantization), {}, lambda count: None
    )


def random_arrays(tensors: dict[str, TensorInfo], quantization: dict[str, Any] | None) -> Iterator[mx.array]:
    """Values about 0.02, ones for norms and variances, and packed ones that stand for values in −0.03..0.03."""
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 0.02, VALUES).astype(np.float32)
    packed = rng.integers(0, 2**32, VALUES, dtype=np.uint32)
    for name, tensor in tensors.items():
        if tensor.dtype == "U32":
            yield mx.array(np.resize(packed, tensor.shape))
        elif quantization and name.endswith((".scales", ".biases")):
            bits = bits_of(quantization, name.rpartition(".")[0])
            value = 0.06 / (2**bits - 1) if name.endswith(".scales") else -0.03
            yield mx.full(tensor.shape, value, dtype=mx.bfloat16)
        elif len(tensor.shape) == 1 and name.endswith(("weight", "scale", "running_var")):
            yield mx.ones(tensor.shape, dtype=mx.bfloat16)
        else:
            yield mx.array(np.resize(normal, tensor.shape)).astype(mx.bfloat16)


def measure(arguments: argparse.Namespace) -> None:
    folder = arguments.work / f"{arguments.variant}-{arguments.quant}-{arguments.text_quant}"
    if not (folder / MANIFEST).exists():
        make_checkpoint(folder, arguments.variant, arguments.quant, arguments.text_quant)
    limit = arguments.limit and parse_memory(arguments.limit)
    options = {"dtype": arguments.dtype, "memory_limit": limit, "prompt_cache": False, "keep": False}
    pipe = Flux2Pipeline.from_pretrained(folder, **options)
    size, length = {"width": arguments.side, "height": arguments.side}, arguments.length
    request = pipe.request([""], **size, steps=arguments.steps, seed=0, max_sequence_length=length)
    output, whole = pipe.run(request, output_type="np"), pipe.plan(request)
    if not np.isfinite(output.images).all():
        sys.exit("the image is not finite")
    row = {
        "model": arguments.variant,
        **{name: getattr(arguments, name) for name in SETTINGS},
        "phases": {phase.name: figures(phase, whole) for phase in output.timings},
        "image": hashlib.sha256(np.ascontiguousarray(output.images).tobytes()).hexdigest()[:16],
    }
    print(json.dumps(row, indent=1))
    print(f"whole run: {whole_peak(row):.3f} GiB")
    if arguments.record:
        others = [x for x in recorded() if any(x[name] != row[name] for name in ("model", *SETTINGS))]
        RECORD.write_text(json.dumps([*others, row], indent=1) + "\n")


def figures(phase: Phase, whole: Plan) -> dict[str, float | None]:
    """Seconds, GiB measured, planned and streamed at each pass, and the share of reading beside the computation."""
    return {
        "seconds": round(phase.seconds, 1),
        "peak": round(phase.peak_memory / GIB, 3),
        "planned": round(whole.phase(phase.name).peak_memory / GIB, 3),
        "streamed": round(phase.streamed / GIB, 3),
        "overlap": phase.overlap and round(phase.overlap, 2),
    }


def main(words: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("table")
    command.add_argument("--readme", type=Path, help="write it there; default: print it")
    command.set_defaults(run=lambda given: write_tables(given.readme) if given.readme else print(tables(), end=""))
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
    command.add_argument("--record", action="store_true", help=f"in {RECORD.name}, for the tables")
    command.set_defaults(run=measure)
    arguments = parser.parse_args(words)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
