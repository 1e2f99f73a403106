"""``veloxbench report`` and ``veloxbench schema``: what records say, and their form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veloxbench.cli.output import deliver


def report(
    records: Annotated[
        list[Path] | None, typer.Argument(help="Folders or .jsonl files of records (default: results).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the page here instead of standard output; a name that ends in .html adds plots."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Compare with this page; exit 1 if it is not what the records say.")
    ] = None,
) -> None:
    """Write BENCHMARK_RESULTS.md from records alone.

    **Examples**

    `veloxbench report results`

    `veloxbench report results --out results.html`

    `veloxbench report records --check BENCHMARK_RESULTS.md`
    """
    from veloxbench.records.selection import read_folders

    measured, others, failures = read_folders(records or [Path("results")])
    target = out if check is None else check
    if target is not None and target.suffix == ".html":
        from veloxbench.report.html import render_html as render
    else:
        from veloxbench.report.page import render
    deliver(render(measured, failures, others), out, check, "veloxbench report", "these records")


def schema() -> None:
    """The JSON Schema of a record line, as published in `schema/record.json`."""
    from veloxbench.records.record import json_schema

    print(json_schema(), end="")
