"""The pages of a run, as files beside its records."""

from __future__ import annotations

from pathlib import Path

from veloxbench.records.journal import write_text
from veloxbench.records.store import Store
from veloxbench.report.html import render_html
from veloxbench.report.page import render

PAGE = "BENCHMARK_RESULTS.md"
HTML_PAGE = "BENCHMARK_RESULTS.html"


def write_pages(folder: Path, store: Store) -> None:
    """Write both pages of a run, as far as there is anything to show."""
    (records, others), failures = store.newest(), store.failures()
    if records or failures:
        write_text(folder / PAGE, render(records, failures, others))
        write_text(folder / HTML_PAGE, render_html(records, failures, others))
