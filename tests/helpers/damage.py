"""Ways to damage a model's folder."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from helpers.checkpoints import edit_json, edit_weights

Damage = Callable[[Path], object]


def remove(name: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def fill(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def resize(name: str, extra: int) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + extra)


def edit(name: str, **changes) -> Damage:
    return lambda folder: edit_json(folder / name, **changes)


def weights(name: str, change: Callable[[dict[str, mx.array]], object]) -> Damage:
    return lambda folder: edit_weights(folder / name, change)
