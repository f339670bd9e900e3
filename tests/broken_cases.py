"""Cases of every outcome, to see that `fuzz.py` tells them."""

import os
import signal
import time
from pathlib import Path

from fuzz import Finding

from flux2_mlx import InputError


class Panic(BaseException):
    """What no `except Exception` catches."""


def _raise(error: BaseException):
    raise error


class Bench:
    def __init__(self, folder: Path):
        self.kinds = {
            "refused": (lambda rng: _raise(InputError("no")), 16 << 20),
            "unclear": (lambda rng: _raise(InputError("no " * 5_000)), 16 << 20),
            "traceback": (lambda rng: _raise(Panic()), 16 << 20),
            "silent": (lambda rng: _raise(Finding("silent", "")), 16 << 20),
            "memory": (lambda rng: str(len(b"1" * (64 << 20))), 16 << 20),
            "crash": (lambda rng: os.kill(os.getpid(), signal.SIGSEGV), 16 << 20),
            "hang": (lambda rng: time.sleep(600), 16 << 20),
            "identical": (lambda rng: "identical", 1 << 30),
        }

    def restore(self) -> None:
        pass
