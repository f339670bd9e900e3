"""The machine, in the words of a bug report."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..device import activation_dtype, chip, cuts_float32, device_memory, dtype_name, on_gpu, on_metal
from .finding import Finding, judged, skipped

_PACKAGES = ("flux2-mlx", "mlx", "mlx-lm", "numpy", "huggingface-hub", "tokenizers")
_MORE_SWAP = 2**29  # bytes


def describe(models: Path) -> dict[str, Any]:
    """Chip, system, memory and versions, what is computed in by default, and the disk of the folder `models`; None for
    what the machine does not tell."""
    facts: dict[str, Callable[[], Any]] = {
        "chip": chip,
        "computes_on": lambda: "Metal" if on_metal() else "CUDA" if on_gpu() else "CPU",
        "system": lambda: f"macOS {platform.mac_ver()[0]}" if on_metal() else platform.platform(),
        "python": platform.python_version,
        "versions": lambda: {name: _version(name) for name in _PACKAGES},
        "memory": lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu_memory": lambda: _of_gpu("max_recommended_working_set_size", "total_memory"),
        "largest_buffer": lambda: _of_gpu("max_buffer_length", "max_buffer_size"),
        "memory_limit": device_memory,
        "dtype": lambda: dtype_name(activation_dtype(None)),
        "tf32": cuts_float32,
        "models_folder": lambda: str(models),
        "free_disk": lambda: _free(models),
    }
    return {name: _known(fact) for name, fact in facts.items()}


def _known(fact: Callable[[], Any]) -> Any:
    """A fact, or None if it raises anything: of a broken machine the other facts are wanted all the more."""
    try:
        return fact()
    except Exception:
        return None


def _of_gpu(*names: str) -> Any:
    """What MLX says of the GPU under the first of these `names` that it has."""
    info = mx.device_info(mx.gpu) if on_gpu() else {}
    return next((info[name] for name in names if name in info), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _free(folder: Path) -> int:
    """Bytes free on the disk where `folder` is or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def swap_used() -> int | None:
    """Bytes of memory that the system has put on disk; None if it does not say."""
    try:
        if on_metal():
            text = subprocess.run(["sysctl", "-n", "vm.swapusage"], capture_output=True, text=True, check=True).stdout
            used = re.search(r"used = (\d+)[.,]?\d*M", text)  # some countries write a comma
            return int(used[1]) * 2**20 if used else None
        fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8")))
        return 1024 * (int(fields["SwapTotal"]) - int(fields["SwapFree"]))
    except (OSError, subprocess.SubprocessError, KeyError, ValueError):
        return None


def check_swap(before: int | None) -> Finding:
    """Whether the checks have pushed other programs' memory onto the disk, where `before` bytes were already."""
    now = swap_used()
    if before is None or now is None:
        return skipped("swap", "the system does not say")
    grown = max(0, now - before)
    advice = "the memory is full; close other programs, or choose a lower memory_limit"
    return judged("swap", f"{grown / 2**20:.0f} MiB more", "< 512 MiB", grown < _MORE_SWAP, advice, "warn")
