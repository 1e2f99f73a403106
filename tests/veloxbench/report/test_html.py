"""The HTML page: the Markdown page's figures, with plots, safe against the user's own names."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.records.arm import REFERENCE
from veloxbench.records.record import Estimate, Record
from veloxbench.records.selection import table_rows
from veloxbench.records.store import read_records
from veloxbench.report.html import plots, render_html
from veloxbench.report.page import render
from veloxbench.report.plots import speed_plot

RECORDS = Path(__file__).parents[3] / "records"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [record for path in sorted(RECORDS.glob("*.jsonl")) for record in read_records(path)]


class Page(HTMLParser):
    """Cells of tables, ids, links and tag names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: set[str] = set()
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        known = dict(attrs)
        if tag == "h2":
            self.ids.add(known["id"] or "")
        if tag == "a" and "href" in known:
            self.links.add((known["href"] or "").removeprefix("#"))
        if tag in ("td", "th"):
            self.in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.cells[-1] += data


def test_cells_are_those_of_the_markdown_page(records):
    """Every table cell of BENCHMARK_RESULTS.md stands in the HTML page, in the same order."""
    lines = [line for line in render(records).splitlines() if line.startswith("|") and not line.startswith("|:")]
    lines = [line for line in lines if set(line) - set("|-: ")]
    cells = [cell.strip() for line in lines for cell in line.strip("|").split("|")]
    assert [cell.strip() for cell in Page(render_html(records)).cells] == cells


def test_section_links_lead_to_headings(records):
    """The navigation names every section, and nothing else."""
    page = Page(render_html(records))
    assert page.links == page.ids
    assert "choosing-a-target-bit-rate" in page.ids


def test_plots_are_one_per_protocol_and_model(records):
    """Each model has a plot per quality protocol, its sizes and text, and one of its speed; each is well-formed SVG."""
    rows = table_rows(records)
    quality = {
        (r.subject.model.name, r.subject.protocol, r.subject.text.tokens_sha256, str(r.subject.settings))
        for r in rows
        if r.subject.suite == "perplexity"
    }
    speed = {r.subject.model.name for r in rows if r.subject.suite == "throughput"}
    drawn = list(plots(records))
    assert len(drawn) == len(quality) + len(speed)
    for plot in drawn:
        assert ET.fromstring(plot.svg).tag.endswith("svg")


def test_a_ratio_of_two_pairs_is_drawn_without_an_interval(records):
    """The plot differs from that of the same values with intervals, and is that of the same values without them."""
    timed = [r for r in records if r.subject.suite == "throughput" and "decode_speed_ratio" in r.metrics]
    first = next(record for record in timed if record.subject.method.name != REFERENCE.name)
    speed = first.metrics["decode_speed_ratio"].model_copy(update={"low": 0.1, "high": 8.8, "interval": "of then"})
    bare = Estimate(value=speed.value, unit=speed.unit)

    def drawn(estimate: Estimate, pairs: int) -> str | None:
        samples = {**first.samples, "decode_arm": [1.0] * pairs}
        metrics = {**first.metrics, "decode_speed_ratio": estimate}
        return speed_plot([first.model_copy(update={"metrics": metrics, "samples": samples})])

    assert drawn(speed, 2) == drawn(bare, 2) != drawn(speed, 3)


def test_names_of_the_user_are_text(records):
    """A model folder named like a script does not become one."""
    fields = records[0].subject.model_dump()
    fields["model"]["name"] = "<script>alert(1)</script>"
    subject = type(records[0].subject).model_validate(fields)
    kept = {name: getattr(records[0], name) for name in ("status", "metrics", "samples", "engagement", "provenance")}
    hostile = Record.create(subject=subject, **kept)
    assert "script" not in Page(render_html([hostile])).tags


def test_page_needs_no_network(records):
    """The page loads no script, style or image from elsewhere."""
    page = Page(render_html(records))
    assert not page.tags & {"script", "link", "img", "iframe"}


def test_a_page_is_checked_as_what_it_is(tmp_path, capsys):
    """``report --check x.html`` passes on the page that ``--out x.html`` wrote, and fails when a letter changes."""
    page = tmp_path / "page.html"
    records = str(RECORDS / "gemma3-270m.jsonl")
    assert veloxbench(["report", records, "--out", str(page)]) == 0
    assert veloxbench(["report", records, "--check", str(page)]) == 0
    page.write_text(page.read_text().replace("Provenance", "provenance", 1))
    assert veloxbench(["report", records, "--check", str(page)]) == 1
    assert "is stale" in capsys.readouterr().err
