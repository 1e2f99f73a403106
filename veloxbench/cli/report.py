"""``veloxbench report`` and ``veloxbench schema``: what records say, and their form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veloxbench.cli.output import deliver
from veloxbench.errors import UsageError


def report(
    records: Annotated[
        list[Path] | None, typer.Argument(help="Folders or .jsonl files of records (default: results).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the report here instead of standard output, in the form that its suffix says: .md, .html (with "
            "plots), .csv, .json, .parquet, .tex or .xml (JUnit)."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="**md**, **html**, **csv**, **json**, **parquet**, **latex**, **junit** or **llama** "
            "(as llama-perplexity prints it, for pull requests).",
        ),
    ] = None,
    badge: Annotated[
        str | None, typer.Option(help="Print the line of a model card for this arm, `turboquant_mse@4`, and leave.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Compare with this page; exit 1 if it is not what the records say.")
    ] = None,
) -> None:
    """Write BENCHMARK_RESULTS.md from records alone, or their figures in a form for other programs.

    CSV and Parquet have one row for each metric of each record; JSON has the records whole.

    **Examples**

    `veloxbench report results`

    `veloxbench report results --out results.html`

    `veloxbench report results --format csv`

    `veloxbench report records --badge turboquant_mse@4`

    `veloxbench report records --check BENCHMARK_RESULTS.md`
    """
    from veloxbench.records.selection import read_folders
    from veloxbench.report.export import FORMATS, format_of

    target = out if check is None else check
    name = format_of(form, "" if target is None else target.suffix)
    if name == "parquet" and target is None:
        raise UsageError("--format parquet is no text: name its file with --out FILE.parquet")
    if badge is not None:
        from veloxbench.report.model_card import badges

        print(badges(read_folders(records or [Path("results")])[0], badge), end="")
        return
    measured, others, failures = read_folders(records or [Path("results")])
    deliver(FORMATS[name](measured, failures, others), out, check, "veloxbench report", "these records")


def schema() -> None:
    """The JSON Schema of a record line, as published in `schema/record.json`."""
    from veloxbench.records.record import json_schema

    print(json_schema(), end="")
