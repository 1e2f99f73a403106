"""What shares a table of the page, and what is kept apart by its heading."""

import re
from datetime import timedelta

import pytest
from gate_records import HARDWARE, MODEL, NOW, quality_record

from veloxbench.records.record import Estimate, FailedMeasurement, Record, TextRef
from veloxbench.report.html import render_html
from veloxbench.report.page import by_model, pages, render
from veloxbench.report.points import BEST, points


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
    first, second = (heading for heading in found if heading.startswith("Quality, chunked"))
    assert (told_apart_by in first) != (told_apart_by in second)


@pytest.mark.parametrize(
    ("other", "told_apart_by"),
    [({"weights_sha256": "9" * 64}, ", weights 99999999"), ({"n_layers": 4}, ", cut to its first 4 layers")],
)
def test_models_of_one_name_have_sections_of_their_own(other, told_apart_by):
    """Other weights, or a cut of the same ones, under the same name are another model; charts name it so too."""
    records = [FIRST, elsewhere(FIRST, model=MODEL.model_copy(update=other))]
    found = [heading for heading in headings(records) if heading.startswith(MODEL.name)]
    assert len(found) == len(set(found)) == 2
    assert sum(told_apart_by in heading for heading in found) == 1
    assert sum(told_apart_by in model for model in by_model(records)) == 1


def crash(minutes: int, **code) -> FailedMeasurement:
    """FIRST's row crashing so long after it was recorded, with other code."""
    subject = FIRST.subject.model_copy(update=code)
    return FailedMeasurement(subject=subject, when=NOW + timedelta(minutes=minutes), reason="boom\nat line 3")


@pytest.mark.parametrize("records", [[], [FIRST]])
def test_a_crash_is_a_line_of_the_page(records):
    """With or without other records, the page says what failed and why, once, by its last attempt."""
    page = render(records, [crash(1), crash(2, harness="other")])
    assert page.count("boom at line 3") == 1
    last = f"{NOW + timedelta(minutes=2):%Y-%m-%d %H:%M}"
    assert f"- smollm2-135m perplexity/chunked turboquant_mse@4, {last}: boom at line 3" in page
    assert "boom at line 3" in render_html(records, [crash(1)])


def test_a_later_record_takes_the_crash_away():
    """Measured after the crash with repaired code, which has another key, the row failed no longer."""
    assert "Failed" not in render([FIRST], [crash(-1, harness="before the repair")])


def test_rows_of_several_machines_say_which():
    """A table of two machines names the machine of each row; of one machine it does not."""
    apple = quality_record(target=2.0, hardware={**HARDWARE, "chip": "Apple M4"})
    assert "| AMD EPYC, 2 cores, cpu, mlx 0.32.2 |" in re.sub(" +", " ", render([FIRST, apple]))
    assert "Apple M4, 2 cores, cpu, mlx" in render([FIRST, apple])
    assert "cores, cpu" not in render([FIRST])


def worded(record: Record) -> Record:
    """The record with all the figures of a verdict."""
    more = {"kld_p99": Estimate(value=0.3, unit="nats/token"), "top1_agreement": Estimate(value=0.9, unit="share")}
    kept = {name: getattr(record, name) for name in ("subject", "status", "samples", "engagement", "provenance")}
    return Record.create(**kept, metrics={**record.metrics, **more})


def test_one_arm_on_two_machines_has_two_rows_and_two_marks():
    """The page, the details' list of hardware and the charts' points have both; the class of chips is named."""
    apple = quality_record(hardware={**HARDWARE, "chip": "Apple M4", "machine": "arm64", "memory_gib": 16.0})
    page = render([FIRST, apple])
    assert "AMD EPYC, 2 cores, cpu, mlx" in page
    assert "Apple M4, 2 cores, cpu, mlx" in page
    labels = {point.label for point in points([worded(FIRST), worded(apple)])[BEST]}
    assert labels == {f"turboquant_mse@4 on {chip}, 2 cores, cpu" for chip in ("AMD EPYC", "Apple M4")}
    assert {point.label for point in points([worded(FIRST)])[BEST]} == {"turboquant_mse@4"}
    details = re.sub(" +", " ", pages([FIRST, apple], drawn=False)[1]["records.md"])
    assert "| apple-silicon | Apple M4 | 2 | 16.0 GiB | cpu |" in details
    assert "nothing from Apple silicon" not in details
    assert "nothing from Apple silicon yet" in pages([FIRST], drawn=False)[1]["records.md"]
