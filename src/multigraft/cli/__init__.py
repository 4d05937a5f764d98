"""The command line: `main` says what is missing, or hands over to `multigraft.cli.app`.

Exit codes: 0 done, 1 a promise of the quick start is broken, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

NEEDED = ("typer", "rich", "transformers")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; ``arguments`` are the process's own by default."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"multigraft: the command line needs {', '.join(missing)}: "
            "pip install 'multigraft[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    try:
        from multigraft.cli.app import run

        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        print("multigraft: interrupted; nothing was saved.", file=sys.stderr)
        code = 130
    raise SystemExit(code)
