"""Processes that are forked from one in which MLX has computed: they are told so, and wait for nothing."""

import os
import signal
import time
import warnings

import numpy as np
import pytest

from flux2_mlx import DeviceError, Flux2Pipeline

SETTINGS = {"width": 16, "height": 16, "num_inference_steps": 1, "max_sequence_length": 8}
PATIENCE = 60  # seconds


def open_demo() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", prompt_cache=False)


USES = {
    "call": lambda pipe: pipe("a fox", **SETTINGS),
    "embeds": lambda pipe: pipe(prompt_embeds=np.zeros((1, 8, 192), np.float32), **SETTINGS),
    "load": lambda pipe: pipe.networks.load("vae"),
    "release": lambda pipe: pipe.release(),
    "open": lambda pipe: open_demo(),
}


def forked(function) -> int | None:
    """What `function` gives in a process that is forked from this one; None if that does not come to an end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of what is tested
        child = os.fork()
    if child == 0:
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    pipe = open_demo()
    pipe("a fox", **SETTINGS)
    return pipe


@pytest.mark.parametrize("use", USES)
def test_a_forked_process_says_that_it_can_not_compute(use, pipe):
    def refused() -> int:
        with pytest.raises(DeviceError, match=r"forked from one in which MLX had computed.*'spawn'"):
            USES[use](pipe)
        return 7

    assert forked(refused) == 7
    pipe("a fox", **SETTINGS)
