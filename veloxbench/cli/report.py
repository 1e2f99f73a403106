"""``veloxbench report`` and ``veloxbench schema``: what records say, and their form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from veloxbench.cli.options import CheckedPage
from veloxbench.cli.output import deliver, to_stderr
from veloxbench.errors import UsageError


def report(
    records: Annotated[
        list[Path] | None, typer.Argument(help="Folders or .jsonl files of records (default: results).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the report here instead of standard output, in the form that its suffix says: .md, .html (one "
            "file, charts that answer), .csv, .json, .parquet, .tex, .xml (JUnit), .svg or .png (charts)."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="**md**, **html**, **csv**, **json**, **parquet**, **latex**, **junit**, **svg**, **png** or "
            "**llama** (as llama-perplexity prints it, for pull requests).",
        ),
    ] = None,
    badge: Annotated[
        str | None, typer.Option(help="Print the line of a model card for this arm, `turboquant_mse@4`, and leave.")
    ] = None,
    details: Annotated[
        Path | None,
        typer.Option(
            help="With Markdown: the folder for charts (SVG, light and dark), and for tables that few readers want. "
            "Without it those tables go to `details` beside the page, which has no charts."
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(help="Upload the rows to this data set of the Hugging Face hub, `user/name`, and leave."),
    ] = None,
    check: CheckedPage = None,
) -> None:
    """Write BENCHMARK_RESULTS.md from records alone, or their figures in a form for other programs.

    CSV and Parquet have one row for each metric of each record; JSON has the records whole. Parquet loads with
    `datasets.load_dataset("parquet", data_files="records.parquet")`.

    **Examples**

    `veloxbench report results`

    `veloxbench report results --out results.html`

    `veloxbench report results --format csv`

    `veloxbench report records --badge turboquant_mse@4`

    `veloxbench report results --push me/kv-caches`

    `veloxbench report records --check BENCHMARK_RESULTS.md --details docs/results`
    """
    from veloxbench.records.selection import read_folders
    from veloxbench.report.export import BINARY, FORMATS, format_of

    paths = records or [Path("results")]
    target = out if check is None else check
    name = format_of(form, "" if target is None else target.suffix)
    if name in BINARY and target is None:
        raise UsageError(f"--format {name} is no text: name its file with --out FILE.{name}")
    if details is not None and (name != "md" or target is None):
        raise UsageError("--details is where a page in Markdown has its charts and tables: name the page with --out")
    measured, others, failures = read_folders(paths)
    if badge is not None:
        from veloxbench.report.model_card import badges

        print(badges(measured, badge), end="")
    elif push is not None:
        from veloxbench.report.hub import push as upload

        to_stderr(upload(measured, push))
    elif name == "md" and target is not None:
        from veloxbench.report.page import DETAILS, pages

        drawn = details is not None
        folder = DETAILS if details is None else Path(os.path.relpath(details, target.parent)).as_posix()
        page, texts = pages(measured, failures, others, folder, drawn)
        files = {f"{folder}/{file}": text for file, text in texts.items()}
        deliver(page, out, check, "veloxbench report", "these records", files)
    elif name == "html":
        from veloxbench.report.history import read_depth, read_history
        from veloxbench.report.html import render_html

        history = read_history(paths)
        page = render_html(history, failures, others + len(measured) - len(history), read_depth(paths))
        deliver(page, out, check, "veloxbench report", "these records")
    else:
        deliver(FORMATS[name](measured, failures, others), out, check, "veloxbench report", "these records")


def schema() -> None:
    """The JSON Schema of a record line, as published in `schema/record.json`."""
    from veloxbench.records.record import json_schema

    print(json_schema(), end="")
