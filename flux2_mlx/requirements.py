"""What this program needs of a machine, said in one line where it is not so. Python 3.6 must be able to read this."""

import os
import re
import sys
from contextlib import contextmanager

from .errors import RequirementError

TYPE_CHECKING = False  # as in __init__.py
if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = (3, 11)
MLX = ((0, 32, 4), (0, 33))  # the first that is right, and the first that nobody has tried
_DARWIN = 23  # the kernel of macOS 14


def check() -> None:
    """Raise RequirementError where Python or the system can't be used. Takes no time, and imports nothing."""
    if sys.version_info[:2] < PYTHON:
        found, wanted = (".".join(map(str, version[:2])) for version in (sys.version_info, PYTHON))
        way_out = "use another one, such as those of Homebrew or uv"
        raise RequirementError(f"Python {wanted} or later is needed, and {sys.executable} is {found}; {way_out}")
    if sys.platform not in ("darwin", "linux"):
        raise RequirementError(f"a Mac with Apple Silicon is needed, or Linux, and this is {sys.platform}")
    if sys.platform == "darwin":
        _check_mac(os.uname())


def _check_mac(system: "os.uname_result") -> None:
    if system.machine != "arm64":
        found = f"{sys.executable} runs as {system.machine}"
        raise RequirementError(f"a Mac with Apple Silicon is needed, and on it a Python for arm64, and {found}")
    if int(system.release.partition(".")[0]) < _DARWIN:
        raise RequirementError(f"macOS 14 or later is needed, and this is an older one (Darwin {system.release})")


def check_mlx(version: str) -> None:
    """Raise RequirementError unless this version of MLX gives right results."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if not MLX[0] <= numbers < MLX[1]:
        raise RequirementError(f'MLX {version} can\'t be used; install the right one: pip install "{mlx_range()}"')


def mlx_range() -> str:
    """The versions of MLX that can be used, as pip reads them."""
    least, above = (".".join(map(str, version)) for version in MLX)
    return f"mlx>={least},<{above}"


@contextmanager
def mlx_needed() -> "Iterator[None]":
    """Turn the ImportError of an MLX that is missing, or lacks the library that computes, into a RequirementError."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != "mlx" and "libmlx" not in str(error):
            raise
        wanted = mlx_range() if sys.platform == "darwin" else mlx_range().replace("mlx", "mlx[cpu]")
        reason = str(error).split("\n")[0]
        raise RequirementError(f'MLX can\'t be loaded ({reason}); install it: pip install "{wanted}"') from error
