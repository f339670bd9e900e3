"""Whether a model's own chat template makes of a prompt what FLUX.2 was trained with."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_PROCESS = Path(__file__).with_name("template_process.py")
_SECONDS = 60  # of a machine that has much else to do; the process itself has five of its own


def check_template(path: Path, template: str, calls: list[dict[str, Any]], expected: list[str]) -> None:
    """CheckpointError if the `template` of the file at `path` makes other texts than `expected` of the `calls`."""
    answer = _answer(json.dumps({"template": template, "calls": calls}))
    if "error" in answer:
        raise CheckpointError(f"{path}: the chat template can't be used: {answer['error']}")
    for found, ours in zip(answer["texts"], expected, strict=True):
        if found != ours:
            raise CheckpointError(
                f"{path}: the chat template makes {found[:300]!r} of a prompt, FLUX.2 has {ours!r}, and nothing else "
                "is implemented"
            )


@lru_cache(maxsize=64)
def _answer(request: str) -> dict[str, Any]:
    """What the process gives for a `request`; an `error` also if it comes to no end."""
    command, options = [sys.executable, str(_PROCESS)], {"capture_output": True, "text": True, "timeout": _SECONDS}
    try:
        return json.loads(subprocess.run(command, input=request, check=False, **options).stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return {"error": "it takes too much time or memory"}
    except OSError as error:
        return {"error": f"no process for it can be started: {error.strerror}"}
