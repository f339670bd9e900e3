"""Time one denoising step of the transformer beside mflux's and diffusers', in alternating runs.

All use float32 and random weights at the width of klein-4b with fewer blocks. Each implementation runs in a process
of its own, told when to step; the ratios are taken run by run, so that a drifting machine does not distort them. CPU
seconds are those of all threads of a process. What is not measured is "–".
`complex` is ours with queries and keys rotated as complex numbers, which have no gradient in MLX.
mflux compiles its step except on M1 and M2, and so does this; on Linux that needs a C++ compiler. It goes into an
environment of its own, with the same version of MLX (on Linux: `pip install mflux==0.24.*`, then `pip uninstall
mlx-cuda-13` and `pip install 'mlx[cpu]'`), and diffusers may do so.

    python scripts/bench_transformer.py --mflux-python ~/mflux/bin/python --blas /usr/lib/…/libblas.so.3
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

DOUBLE, SINGLE, HEADS, CONTEXT = 2, 4, 24, 7680
SIDE, TEXT = 32, 512  # 1024 image tokens, those of a 512×512 image
SIGMA = 0.9


Implementation = tuple[Callable[[], object], Callable[[], int | None]]  # a step, and bytes of its activations


def ours() -> Implementation:
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_map

    from flux2_mlx.config import TransformerConfig
    from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids
    from flux2_mlx.transformer.execution import executions

    config = TransformerConfig(DOUBLE, SINGLE, HEADS, CONTEXT, guidance_embeds=False)
    execution = next(executions(config))
    model = Flux2Transformer(config)
    model.update(tree_map(lambda x: mx.random.normal(x.shape, scale=x.shape[-1] ** -0.5), model.parameters()))
    mx.eval(model.parameters())
    tokens, text = mx.random.normal((1, SIDE * SIDE, 128)), mx.random.normal((1, TEXT, CONTEXT))

    # Text projection and rotations belong to the run, not to the step; they are made anew here to be fair.
    def step():
        rope = rope_table(np.concatenate([text_ids(TEXT), image_ids(SIDE, SIDE)]), config)
        mx.eval(model(tokens, model.txt_in(text), mx.array([SIGMA]), rope, execution=execution))

    mx.eval(tokens, text)
    return step, _mlx_activations(step)


def ours_complex() -> Implementation:
    import mlx.core as mx

    from flux2_mlx import transformer
    from flux2_mlx.transformer import blocks

    real_table = transformer.rope_table

    def rope_table(ids, config):
        table = real_table(ids, config)
        return table[:, 0, ::2] + 1j * table[:, 1, 1::2]

    def rotate(x, table):
        return (x.astype(mx.float32).view(mx.complex64) * table).view(mx.float32).astype(x.dtype)

    transformer.rope_table, blocks.rotate = rope_table, rotate
    return ours()


def mflux() -> Implementation:
    import mlx.core as mx
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
    from mflux.utils.apple_silicon import AppleSiliconUtil

    ModelConfig.precision = mx.float32
    model = Flux2Transformer(num_layers=DOUBLE, num_single_layers=SINGLE)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    tokens, text = mx.random.normal((1, SIDE * SIDE, 128)), mx.random.normal((1, TEXT, CONTEXT))
    rows, columns = mx.meshgrid(mx.arange(SIDE), mx.arange(SIDE), indexing="ij")
    zeros = mx.zeros_like(rows)
    img_ids = mx.stack([zeros, rows, columns, zeros], axis=-1).reshape(1, -1, 4)
    txt_ids = mx.pad(mx.arange(TEXT)[:, None], [(0, 0), (3, 0)])[None]
    timestep = mx.array(SIGMA)
    predict = model if AppleSiliconUtil.is_m1_or_m2() else mx.compile(lambda *arrays: model(*arrays))

    def step():
        mx.eval(predict(tokens, text, timestep, img_ids, txt_ids))

    mx.eval(tokens, text, timestep, img_ids, txt_ids)
    return step, _mlx_activations(step)


def diffusers() -> Implementation:
    import torch
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        num_layers=DOUBLE, num_single_layers=SINGLE, num_attention_heads=HEADS, joint_attention_dim=CONTEXT,
        guidance_embeds=False,
    ).eval()  # fmt: skip
    tokens, text = torch.randn(1, SIDE * SIDE, 128), torch.randn(1, TEXT, CONTEXT)
    axis = torch.arange(SIDE)
    img_ids = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), axis, axis, torch.zeros(1, dtype=torch.int64))
    txt_ids = torch.nn.functional.pad(torch.arange(TEXT)[:, None], (3, 0))

    def step():
        with torch.no_grad():
            model(tokens, text, torch.tensor([SIGMA]), img_ids[None], txt_ids[None], None)

    return step, lambda: None


def _mlx_activations(step: Callable[[], object]) -> Callable[[], int]:
    """Peak memory of a step above what is held between steps."""
    import mlx.core as mx

    def measure() -> int:
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        step()
        return mx.get_peak_memory() - held

    return measure


def work(name: str) -> None:
    """Step whenever a line comes in, and answer with the seconds it took, the CPU's as well. The first step, which
    compiles, is not counted."""
    step, activations = {"ours": ours, "complex": ours_complex, "mflux": mflux, "diffusers": diffusers}[name]()
    step()
    print(json.dumps({"activations": activations()}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        step()
        taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps(taken), flush=True)


class Worker:
    def __init__(self, name: str, python: str, blas: str | None):
        environment = os.environ | ({"LD_PRELOAD": blas} if blas and name != "diffusers" else {})
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.activations = self._read()["activations"]
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def _read(self) -> dict[str, float | None]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the {self.name} worker ended early")
        return json.loads(line)

    def step(self) -> None:
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        taken = self._read()
        self.seconds.append(taken["seconds"])
        self.cpu.append(taken["cpu"])

    def row(self, first: "Worker") -> str:
        """What it took, beside the `first` one, run by run."""
        ratios = [mine / theirs for mine, theirs in zip(first.seconds, self.seconds, strict=True)]
        activations = "–" if self.activations is None else f"{self.activations / 1e9:.3f}"
        return f"{self.name:10} {spread(self.seconds)}  {spread(self.cpu)}  {spread(ratios)} {activations:>12}"


def spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum; "–" if there is none."""
    if not values:
        return f"{'–':>23}"
    return " ".join(f"{x:7.3f}" for x in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mflux-python", help="python of an environment with mflux; left out: no mflux")
    parser.add_argument("--complex", action="store_true", help="compare with rotation by complex numbers as well")
    parser.add_argument("--diffusers-python", help="python of one with diffusers and PyTorch; left out: no diffusers")
    parser.add_argument("--blas", help="BLAS library to preload on Linux, where MLX's wheel links the reference BLAS")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    workers = [Worker("ours", sys.executable, arguments.blas)]
    if arguments.complex:
        workers.append(Worker("complex", sys.executable, arguments.blas))
    if arguments.mflux_python:
        workers.append(Worker("mflux", arguments.mflux_python, arguments.blas))
    if arguments.diffusers_python:
        workers.append(Worker("diffusers", arguments.diffusers_python, None))
    for _ in range(arguments.runs):
        for worker in workers:
            worker.step()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.runs} runs each")
    columns = ("seconds: min, median, max", "CPU seconds", "ours / it")
    print(f"{'':10} " + "  ".join(f"{column:>23}" for column in columns) + " activations, GB")
    for worker in workers:
        print(worker.row(workers[0]))
    measured = [worker.name for worker in workers]
    for name in ("mflux", "diffusers"):
        if name not in measured:
            print(f"{name:10} {spread([])}  {spread([])}  {spread([])} {'–':>12}")


if __name__ == "__main__":
    main()
