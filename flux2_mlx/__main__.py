"""`python -m flux2_mlx`, and the console script."""

import _signal  # not signal, which imports so much that Ctrl-C is likely to fall into it

# Python's own handler would show where in an import Ctrl-C has come. Until `main` handles it, it ends the process.
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from .errors import RequirementError
from .requirements import check

try:
    check()
except RequirementError as error:  # before anything that older Pythons can't read
    raise SystemExit(f"Error: {error}") from None

from .cli.main import main

if __name__ == "__main__":
    main()
