"""`flux2-mlx cache`."""

from pathlib import Path

import click

from .options import json_option, models_dir_option
from .terminal import print_result, to_json


@click.command(hidden=True)
@click.option("--clear", is_flag=True, help="Remove them all.")
@models_dir_option
@json_option
def cache(clear: bool, models_dir: Path | None, as_json: bool) -> None:
    """Show the encoded prompts that are kept on disk, as `models` does, or clear them.

    A prompt seen before needs no text encoder. The least recently used ones make room for new ones; the limit is
    $FLUX2_MLX_CACHE_BYTES, or 1 GB.

    \b
    Examples:
      flux2-mlx cache
      flux2-mlx cache --clear
    """
    from ..embedding_cache import FOLDER, EmbeddingCache
    from ..store import models_folder

    prompts = EmbeddingCache(models_folder(models_dir) / FOLDER)
    if clear:
        prompts.clear()
    entries = prompts.entries()
    count = len(entries)
    size = sum(entry.size for entry in entries)
    if as_json:
        values = {"folder": str(prompts.folder), "entries": count, "bytes": size, "limit": prompts.max_bytes}
        print_result(to_json(values))
    else:
        print_result(
            f"{count} encoded prompts, {size / 1e6:.1f} of {prompts.max_bytes / 1e6:.1f} MB, in {prompts.folder}"
        )
