"""The HTML page: the Markdown page's figures, charts, a leaderboard; safe against the user's own names, no network."""

import csv
import io
import json
import re
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.records.record import Record
from veloxbench.records.selection import table_rows
from veloxbench.records.store import read_records
from veloxbench.report.charts import by_position
from veloxbench.report.html import render_html
from veloxbench.report.page import render

RECORDS = Path(__file__).parents[3] / "records"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [r for name in ("gemma3-270m", "smollm2-135m-fisher") for r in read_records(RECORDS / f"{name}.jsonl")]


@pytest.fixture(scope="module")
def text(records) -> str:
    return render_html(records)


class Page(HTMLParser):
    """Cells of tables, what attributes name, and tag names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.named: list[str] = []
        self.tags: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.named += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action")]
        if tag in ("td", "th"):
            self.in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.cells[-1] += data


def rows_of(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, flags=re.DOTALL)[1])


def test_cells_are_those_of_the_markdown_page(records, text):
    """Every table cell of BENCHMARK_RESULTS.md stands at the end of the HTML page, in the same order."""
    lines = [line for line in render(records).splitlines() if line.startswith("|") and not line.startswith("|:")]
    lines = [line for line in lines if set(line) - set("|-: ")]
    cells = [unescape(cell.strip().replace("\\*", "*")) for line in lines for cell in line.strip("|").split("|")]
    assert [cell.strip() for cell in Page(text).cells][-len(cells) :] == cells


def test_every_quality_record_is_on_the_leaderboard(records, text):
    """By its own id, with its own figure; what a control or the reference lost is not there."""
    board = rows_of(text)["board"]
    measured = [r for r in table_rows(records) if "kld_p99" in r.metrics]
    assert {r.id[:12] for r in measured} <= {row["record"] for row in board}
    klds = {row["record"]: row["kld"] for row in board}
    assert all(klds[r.id[:12]] == max(1e-4, r.metrics["kld_mean"].value) for r in measured)


def test_a_size_at_a_context_is_exact_where_the_formula_says_so(text):
    """mlx-affine@4 on gemma: 3 of 18 layers at 4.5 bits grow, 15 in fp16 end at their window of 512 tokens."""
    (row,) = [r for r in rows_of(text)["board"] if r["arm"] == "mlx-affine@4" and r["group"].startswith("decode")]
    for context, bits in zip(rows_of(text)["contexts"], row["bits_at"], strict=True):
        grown, kept = 3 * context, 15 * min(context, 512)
        assert bits == pytest.approx((4.5 * grown + 16 * kept) / (grown + kept), rel=1e-3)


def test_downloads_are_in_the_page(text):
    """Its links to files are the files themselves, and the CSV has a line for each row of the leaderboard."""
    links = dict(re.findall(r'download="(\S+)" href="data:\S+?;base64,(\S+)"', text))
    board = rows_of(text)["board"]
    assert json.loads(b64decode(links["leaderboard.json"])) == board
    lines = list(csv.DictReader(io.StringIO(b64decode(links["leaderboard.csv"]).decode())))
    assert [line["record"] for line in lines] == [row["record"] for row in board]


def test_names_of_the_user_are_text(records):
    """A model folder named like the end of a script is no tag and ends none."""
    fields = records[0].subject.model_dump()
    fields["model"]["name"] = "</script><script>alert(1)</script><b>"
    subject = type(records[0].subject).model_validate(fields)
    kept = {name: getattr(records[0], name) for name in ("status", "metrics", "samples", "engagement", "provenance")}
    hostile = render_html([Record.create(subject=subject, **kept)])
    assert Page(hostile).tags.count("script") == hostile.count("<script") <= 3
    assert "b" not in Page(hostile).tags


def test_page_needs_no_network(text):
    """Nothing that it names is elsewhere: anchors and data alone."""
    assert all(name.startswith(("#", "data:")) for name in Page(text).named)
    assert not {"link", "img", "iframe"} & set(Page(text).tags)


def test_a_page_is_checked_as_what_it_is(tmp_path, capsys):
    """``report --check x.html`` passes on the page that ``--out x.html`` wrote, and fails when a letter changes."""
    page = tmp_path / "page.html"
    records = str(RECORDS / "gemma3-270m.jsonl")
    assert veloxbench(["report", records, "--out", str(page)]) == 0
    assert veloxbench(["report", records, "--check", str(page)]) == 0
    page.write_text(page.read_text().replace("Provenance", "provenance", 1))
    assert veloxbench(["report", records, "--check", str(page)]) == 1
    assert "is stale" in capsys.readouterr().err


def test_error_by_position_is_drawn_from_the_task_by_depth(records):
    """A point for each part of the text, at its end; other tasks and records without such parts draw none."""
    record = next(r for r in records if "kld_mean" in r.metrics)
    assert by_position([record], ["fisher_klt"]) is None
    parts = {f"kld_mean_to_{end}": record.metrics["kld_mean"] for end in (512, 1024)}
    subject = record.subject.model_copy(update={"protocol": "by depth", "settings": {"length": 1024}})
    deep = record.model_copy(update={"subject": subject, "metrics": {**record.metrics, **parts}})
    drawn = by_position([deep, record], [record.subject.method.name]).to_dict()
    spots = [row for rows in drawn["datasets"].values() for row in rows] or drawn["data"]["values"]
    assert [(row["position"], row["kld"]) for row in spots] == [
        (end, record.metrics["kld_mean"].value) for end in (512, 1024)
    ]
