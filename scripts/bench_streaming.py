"""Stream a transformer from a slow disk, beside what reading and computing take alone. For Linux with a C compiler.

    python scripts/bench_streaming.py --dtype float16 --tokens 8 --ratio 1

A small transformer of random weights is written into a temporary folder. Reading it is made slow by a library, put
before the system's own, whose reads sleep: until the blocks take `--ratio` times as long as the computation. What is
printed of a pass: seconds of computing, of reading, and streamed; the last in terms of the longer of the former; and
the share of the reading beside the computation, by streaming's own count and by these clocks.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from bench_memory import write_component

from flux2_mlx.checkpoint import Component
from flux2_mlx.config import TransformerConfig
from flux2_mlx.streaming import Reading, load_streamed
from flux2_mlx.transformer import image_ids, rope_table, text_ids

CONFIG = TransformerConfig(4, 12, 8, 512, 64, 16, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False)
LIBRARY = "FLUX2_SLOW_DISK"  # where it is, in the environment of the process that it was put before
SLOW_READS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

double seconds_per_byte = 0;
static pthread_mutex_t disk = PTHREAD_MUTEX_INITIALIZER;

static void wait_for(int file, ssize_t count) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (seconds_per_byte <= 0 || count <= 0 || length < 12 || memcmp(path + length - 12, ".safetensors", 12)) return;
  double seconds = count * seconds_per_byte;
  struct timespec time = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
  pthread_mutex_lock(&disk);  // which MLX may read with several threads, is one
  nanosleep(&time, NULL);
  pthread_mutex_unlock(&disk);
}

ssize_t read(int file, void *to, size_t count) {
  ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
  ssize_t done = real(file, to, count);
  wait_for(file, done);
  return done;
}

ssize_t pread(int file, void *to, size_t count, off_t at) {
  ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
  ssize_t done = real(file, to, count, at);
  wait_for(file, done);
  return done;
}

ssize_t pread64(int file, void *to, size_t count, off_t at) { return pread(file, to, count, at); }
"""


def restart(folder: Path) -> None:
    """Replace this process by one with the library before the system's own."""
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(SLOW_READS)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    before = [str(library), *filter(None, [os.environ.get("LD_PRELOAD")])]
    environment = os.environ | {"LD_PRELOAD": ":".join(before), LIBRARY: str(library)}
    sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


def component(folder: Path) -> Component:
    """A transformer of random weights in bfloat16."""
    plain = Component("transformer", CONFIG, None, ())
    write_component(folder, plain)
    return Component("transformer", CONFIG, None, (folder / "model.safetensors",))


def forward(network: nn.Module, dtype: mx.Dtype, tokens: int) -> Callable[[], None]:
    """A pass over so many tokens, half of them text."""
    tokens //= 2
    image = mx.random.normal((1, tokens, CONFIG.in_channels), key=mx.random.key(0)).astype(dtype)
    text = mx.random.normal((1, tokens, CONFIG.hidden_size), key=mx.random.key(1)).astype(dtype)
    rope = rope_table(np.concatenate([text_ids(tokens), image_ids(1, tokens)]), CONFIG)
    mx.eval(image, text, rope)
    return lambda: mx.eval(network(image, text, mx.array([0.5]), rope))


def measure(folder: Path, dtype: mx.Dtype, tokens: int, ratio: float, times: int) -> str:
    part, counted = component(folder), Reading()
    rate = ctypes.c_double.in_dll(ctypes.CDLL(os.environ[LIBRARY]), "seconds_per_byte")
    reader = load_streamed(part, dtype, 0, Reading())

    def read() -> None:
        for blocks in (reader.double_blocks, reader.single_blocks):
            for _ in blocks:
                pass

    compute = forward(part.load(dtype), dtype, tokens)
    stream = forward(load_streamed(part, dtype, 0, counted), dtype, tokens)
    works = {"computing": compute, "reading": read, "streamed": stream}
    for work in works.values():
        timed(work)
    rate.value = ratio * min(timed(compute) for _ in range(times)) / part.files[0].stat().st_size
    took, before = {name: [] for name in works}, replace(counted)
    for _ in range(times):  # in turns, so that other programs slow all of them
        for name, work in works.items():
            took[name].append(timed(work))
    computing, reading, streamed = (min(seconds) for seconds in took.values())
    sums = [sum(seconds) for seconds in took.values()]
    outside = 1 - (sums[2] - sums[0]) / sums[1]
    return (
        f"computing {computing:.2f} s, reading {reading:.2f} s, streamed {streamed:.2f} s: "
        f"{streamed / max(computing, reading):.2f} times the longer; "
        f"beside the computation {counted.since(before).overlap:.0%}, by these clocks {outside:.0%}"
    )


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--times", type=int, default=5, help="that each is done; the shortest count")
    parser.add_argument("--ratio", type=float, default=1.0, help="of reading to computing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if LIBRARY not in os.environ:
            restart(Path(folder))
        print(measure(Path(folder), getattr(mx, arguments.dtype), arguments.tokens, arguments.ratio, arguments.times))


if __name__ == "__main__":
    main()
