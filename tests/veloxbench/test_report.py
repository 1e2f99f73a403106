"""What shares a table of the page, and what is kept apart by its heading."""

import re

import pytest
from gate_records import MODEL, quality_record

from veloxbench.records import Record, TextRef
from veloxbench.report.html import plots
from veloxbench.report.markdown import render


def elsewhere(record: Record, **changes) -> Record:
    """The same measurement of another subject."""
    kept = {name: getattr(record, name) for name in ("status", "metrics", "samples", "engagement", "provenance")}
    return Record.create(subject=record.subject.model_copy(update=changes), **kept)


def headings(records: list[Record]) -> list[str]:
    return re.findall(r"^#+ (.*)$", render(records), flags=re.MULTILINE)


FIRST = quality_record()
SETTINGS = FIRST.subject.settings
TEXT = FIRST.subject.text


@pytest.mark.parametrize(
    ("change", "told_apart_by"),
    [
        ({"settings": {**SETTINGS, "length": 999}}, "length 999"),
        ({"text": TextRef(name="gutenberg", tokens_sha256="9" * 64)}, "text gutenberg"),
        ({"text": TextRef(name=TEXT.name, tokens_sha256="9" * 64)}, "tokens 99999999"),
    ],
)
def test_rows_of_other_sizes_or_texts_have_a_table_of_their_own(change, told_apart_by):
    """An arm measured on two sizes or two texts stands once under each of two headings, which differ."""
    found = headings([FIRST, elsewhere(FIRST, **change)])
    for start in (f"{MODEL.name} (chunked", "Quality, chunked"):
        first, second = (heading for heading in found if heading.startswith(start))
        assert (told_apart_by in first) != (told_apart_by in second)


def test_a_single_table_names_its_text():
    """With one text and size the heading says the text alone."""
    assert f"{MODEL.name} (chunked protocol; text {TEXT.name})" in headings([FIRST])


@pytest.mark.parametrize(
    ("other", "told_apart_by"),
    [({"weights_sha256": "9" * 64}, ", weights 99999999"), ({"n_layers": 4}, ", cut to its first 4 layers")],
)
def test_models_of_one_name_have_sections_of_their_own(other, told_apart_by):
    """Other weights, or a cut of the same ones, under the same name are another model; plots say so too."""
    records = [FIRST, elsewhere(FIRST, model=MODEL.model_copy(update=other))]
    found = [heading for heading in headings(records) if heading.startswith(MODEL.name)]
    assert len(found) == len(set(found)) == 4  # a table and a section each
    assert sum(told_apart_by in heading for heading in found) == 2
    assert sum(told_apart_by in plot.caption for plot in plots(records)) == 1
