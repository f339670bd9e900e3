"""Entry point of the console script. It imports next to nothing before signals are handled."""

import sys

from .stopping import report, stoppable


def main() -> None:
    """Run the command that `sys.argv` names."""
    try:
        with stoppable():
            from .group import cli

            cli(prog_name="flux2-mlx")
    except KeyboardInterrupt as stop:  # while modules were imported, or on the way out
        sys.exit(report(stop))


def __getattr__(name: str) -> object:
    if name == "cli":
        from .group import cli

        return cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
