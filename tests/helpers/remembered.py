"""Pictures that remember settings, as those do that were made."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from flux2_mlx.images import read_settings


def save_remembering(path: str | Path, settings: dict[str, Any]) -> None:
    """Write a small picture whose file says that it was made with these settings."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux2-mlx", json.dumps(settings))
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)


def remember(path: str | Path, source: str = "a.png", **changes: Any) -> None:
    """Write a picture with the settings of another, some of them changed."""
    save_remembering(path, read_settings(Path(source)) | changes)
