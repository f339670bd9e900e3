"""Whether a model's own chat template makes of a prompt what FLUX.2 was trained with."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_PROCESS = Path(__file__).with_name("template_process.py")
_SECONDS = 60  # enough on a busy machine; the process limits itself to five of processor time


def check_template(path: Path, template: str, calls: list[dict[str, Any]], expected: list[str]) -> None:
    """CheckpointError if the `template` of the file at `path` makes other texts than `expected` of the `calls`."""
    try:
        texts = _rendered(json.dumps({"template": template, "calls": calls}))
    except ValueError as error:
        raise CheckpointError(f"{path}: the chat template can't be used: {error}") from error
    for found, ours in zip(texts, expected, strict=True):
        if found != ours:
            raise CheckpointError(
                f"{path}: the chat template makes {found[:300]!r} of a prompt, FLUX.2 has {ours!r}, and nothing else "
                "is implemented"
            )


@lru_cache(maxsize=64)
def _rendered(request: str) -> list[str]:
    """The texts that the process gives for a `request`; ValueError if it gives none, which is not remembered."""
    command = [sys.executable, str(_PROCESS)]
    try:
        process = subprocess.run(command, input=request, capture_output=True, text=True, check=False, timeout=_SECONDS)
        answer = json.loads(process.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise ValueError("it takes too much time or memory") from error
    except OSError as error:
        raise ValueError(f"no process for it can be started: {error.strerror}") from error
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["texts"]
