"""The pages of a run, as files beside its records."""

from __future__ import annotations

from pathlib import Path

from veloxbench.records.journal import write_text
from veloxbench.records.store import Store
from veloxbench.report.history import read_history
from veloxbench.report.page import DETAILS, pages

PAGE = "BENCHMARK_RESULTS.md"
HTML_PAGE = "BENCHMARK_RESULTS.html"


def write_pages(folder: Path, store: Store) -> None:
    """Write the pages of a run, as far as there is anything to show; the HTML page has the charts."""
    (records, others), failures = store.newest(), store.failures()
    if records or failures:
        from veloxbench.report.html import render_html  # a second for its charts: not before there is a page

        history = read_history([store.path])
        page, texts = pages(records, failures, others, drawn=False)
        files = {f"{DETAILS}/{name}": text for name, text in texts.items()} | {PAGE: page}
        files |= {HTML_PAGE: render_html(history, failures, others + len(records) - len(history))}
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / name, text)
