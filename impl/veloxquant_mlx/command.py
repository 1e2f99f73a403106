"""The frame of this package's commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rich.console import Console

CONSOLE: Final = Console(stderr=True)


def run(app: Callable[[], object], name: str, go_on: str) -> None:
    """Run a command line: bad input is one sentence and exit code 2, Ctrl-C one that says how to ``go_on``, and 130."""
    try:
        app()
    except SystemExit as left:
        if left.code == 130:  # typer makes it of Ctrl-C, without a word
            CONSOLE.print(f"{name}: stopped; {go_on}", markup=False)
        raise
    except (ValueError, OSError) as error:
        CONSOLE.print(f"{name}: {error}", style="red", markup=False)
        raise SystemExit(2) from error
