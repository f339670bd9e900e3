"""What runs leave behind in their process: nothing of MLX's random numbers, and no memory."""

import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.mlx_state import randomized

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import variant_components
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import QUANTIZATIONS, VARIANTS
from flux2_mlx.text import LanguageModel, LaterLayers, TextEncoder
from flux2_mlx.text.generation import generate
from flux2_mlx.vae import VAECost

pytestmark = pytest.mark.usefixtures("models")


def draws() -> list[float]:
    return mx.random.uniform(shape=(4,)).tolist()


@pytest.fixture
def untouched():
    """Fails unless the numbers that follow the caller's seed are those that would have followed without the test."""
    mx.random.seed(1)
    draws()
    expected = draws()
    mx.random.seed(1)
    draws()
    yield
    assert draws() == expected


@pytest.mark.parametrize("quant", QUANTIZATIONS)
@pytest.mark.usefixtures("untouched")
def test_building_networks_draws_no_random_numbers(quant):
    for variant in ("klein-4b", "dev"):
        components = variant_components(VARIANTS[variant], quant)
        for component in components.values():
            component.build()
    assert components.keys() == COMPONENTS.keys()


@pytest.mark.usefixtures("untouched")
def test_planning_draws_no_random_numbers():
    cost = VAECost(VARIANTS["demo"].vae, mx.float32)
    assert min(cost.encoding(64, 64), cost.decoding(64, 64)) > 0


@pytest.mark.parametrize("quant", [None, "qint8"])
@pytest.mark.usefixtures("untouched")
def test_a_run_draws_no_random_numbers(quant):
    pipe = Flux2Pipeline.from_pretrained("demo", quant=quant)
    pipe("red", width=32, height=32, num_inference_steps=1)


@pytest.fixture
def language_model() -> LanguageModel:
    config = replace(VARIANTS["demo"].text, num_later_layers=1)
    return LanguageModel(randomized(TextEncoder(config)), randomized(LaterLayers(config)))


@pytest.mark.parametrize("seed", [None, 7])
def test_writing_text_draws_no_random_numbers_of_the_caller(seed, language_model, untouched):
    ids = [list(generate(language_model, [1, 2], frozenset(), seed=seed, max_tokens=8)) for _ in range(2)]
    assert (ids[0] == ids[1]) == (seed is not None)


def grown(script: str, warm: int, count: int) -> float:
    """MB that a process grows by while it runs `script` `count` times, after `warm` times."""
    script = f"""
import gc, os, resource
from pathlib import Path
from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import variant_components
from flux2_mlx.config import VARIANTS

def held():
    gc.collect()
    pages = Path("/proc/self/statm")
    if pages.exists():  # on Linux the peak is at least that of the process that started this one
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

{script}

for number in range({warm} + {count}):
    if number == {warm}:
        before = held()
    once()
print((held() - before) / 1e6)
"""
    command = [sys.executable, "-c", script]
    return float(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


def test_building_leaves_no_memory_behind():
    assert (
        grown(
            """
components = list(variant_components(VARIANTS["klein-4b"], "qint8").values())
def once():
    for component in components:
        component.build()
""",
            warm=10,
            count=20,
        )
        < 5
    )


def test_runs_leave_no_memory_behind():
    assert (
        grown(
            """
pipe = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)
def once():
    pipe("red", width=16, height=16, num_inference_steps=1)
""",
            warm=10,
            count=20,
        )
        < 5
    )
