"""Tables by suite: the built-in ones in order, another package's own, and a plain one where there is none."""

import importlib.metadata
import re

import pytest
from gate_records import quality_record
from tabulate import tabulate

from veloxbench.records.plugins import load_plugins
from veloxbench.records.record import NO_MODEL, Record
from veloxbench.report import tables
from veloxbench.report.cells import pipe_table
from veloxbench.report.page import render
from veloxbench.report.tables import TABLES, register_table, sections


def of_suite(suite: str, **changes) -> Record:
    """A record of any suite, known to the records' schema or not."""
    record = quality_record()
    return record.model_copy(update={"subject": record.subject.model_copy(update={"suite": suite, **changes})})


@pytest.fixture
def own_tables(monkeypatch):
    """The registry as a test may fill it."""
    monkeypatch.setattr(tables, "TABLES", dict(TABLES))


def test_two_functions_for_a_suite_are_a_defect():
    """The second registration raises and names the suite."""
    with pytest.raises(ValueError, match="'memory' are registered twice"):
        register_table("memory")(list)


def test_a_suite_without_tables_is_shown_whole():
    """Every metric is a column, under a heading with the suite's name: nothing that was measured is hidden."""
    page = render([quality_record(), of_suite("toy")])
    section = page[page.index("### Toy, chunked") :]
    header = [
        cell.strip() for cell in re.search(r"^\|.*method.*$", section, flags=re.MULTILINE)[0].strip("|").split("|")
    ]
    assert header == ["method", *quality_record().metrics]
    assert page.index("### Quality") < page.index("### Toy")


def test_a_suite_that_reads_no_model_has_a_section_of_its_own():
    """It stands after the models, and no model is called "no model"."""
    page = render([quality_record(), of_suite("toy", model=NO_MODEL)])
    assert "\n## Toy, chunked" in page
    assert "## no model" not in page


@pytest.mark.usefixtures("own_tables")
def test_another_package_brings_its_tables(monkeypatch):
    """The module that an entry point names registers a function, which writes that suite's sections."""

    class Point:
        def load(self):
            register_table("toy")(lambda records: [f"### Toys: {len(records)}"])

    def entry_points(*, group):
        return [Point()] if group == "veloxbench.tables" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    load_plugins.cache_clear()
    try:
        assert sections([of_suite("toy"), of_suite("toy")]) == ["### Toys: 2"]
        assert sections([of_suite("toy")]) == ["### Toys: 1"]  # loaded once: a second time would raise
    finally:
        load_plugins.cache_clear()


@pytest.mark.parametrize("body", [[], [("x", "1.5", "a long cell"), ("μ, not narrow", "", " trimmed ")]])
@pytest.mark.parametrize("aligned", [None, ["right", "left", "right"]])
def test_a_table_is_the_one_that_tabulate_writes(body, aligned):
    """The same characters, for `tabulate` takes five times as long over the thousands of tables of a large folder."""
    header = ("method", "bits", "")
    theirs = tabulate(body, header, tablefmt="pipe", disable_numparse=True, colalign=aligned)
    assert pipe_table(header, body, aligned) == theirs
