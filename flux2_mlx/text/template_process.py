"""Renders chat templates, which are programs of strangers, in a process of its own with little time and memory.

It is run by its path and reads `{"template": text, "calls": [variables]}` from stdin. It writes `{"texts": [text]}` or
`{"error": text}`. The environment is that of transformers' `render_jinja_template`.
"""

import json
import resource
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS = 5  # of processor time
_BYTES = 1 << 30  # of memory
_CHARACTERS = 100_000


class _Generation(Extension):
    """The tag that marks what an assistant says: its body is rendered as if the tag were not there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _rendered(template: str, calls: list[dict[str, Any]]) -> list[str]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    program = environment.from_string(template)
    return [program.render(**variables)[:_CHARACTERS] for variables in calls]


def main() -> None:
    for limit, value in ((resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, _BYTES), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # not every system has each of them
            resource.setrlimit(limit, (value, value))
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"texts": _rendered(request["template"], request["calls"])}
    except Exception as error:  # whatever a template does wrong
        answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
