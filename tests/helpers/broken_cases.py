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
        self.size = 0
        self.kinds = {
            "refused": lambda rng: _raise(InputError("no")),
            "unclear": lambda rng: _raise(InputError("no " * 5_000)),
            "traceback": lambda rng: _raise(Panic()),
            "silent": lambda rng: _raise(Finding("silent", "")),
            "memory": lambda rng: self._take(20),
            "identical": lambda rng: self._take(20, given=4),
            "crash": lambda rng: os.kill(os.getpid(), signal.SIGSEGV),
            "hang": lambda rng: time.sleep(600),
        }

    def _take(self, megabytes: int, given: int = 0) -> str:
        """Use so much memory for so much input."""
        self.size += given << 20
        return "identical" if b"1" * (megabytes << 20) else ""

    def restore(self) -> None:
        pass
