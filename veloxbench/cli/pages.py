"""What commands do with a generated page: write it, print it, or say that the one that is there is stale."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import typer

from veloxbench.errors import ExitCode
from veloxbench.records.journal import write_text


def deliver(
    page: str,
    out: Path | None,
    check: Path | None,
    command: str,
    source: Path | str,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Compare the page with ``check``, or write it to ``out``, or print it.

    Args:
        command: what writes the page from ``source``, named where a file is stale.
        figures: files that belong beside the page, by name; they are compared and written with it.
    Raises:
        typer.Exit: with :attr:`ExitCode.REGRESSION`, a compared file is stale.
    """
    target = check or out
    if target is None:
        print(page, end="")
        return
    files = {target: page} | {target.with_name(name): text for name, text in (figures or {}).items()}
    if check is None:
        for path, text in files.items():
            write_text(path, text)
        return
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path} is stale: it is not what `{command}` writes from {source}", file=sys.stderr)
    if stale:
        raise typer.Exit(int(ExitCode.REGRESSION))
