"""The page as one HTML file that needs nothing else: charts and a leaderboard that answer, and all tables."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt

from veloxbench.errors import printable
from veloxbench.gate.changes import Changes, change_points
from veloxbench.records.record import FailedMeasurement, Record
from veloxbench.records.selection import by_machine, newest_per_row, table_rows
from veloxbench.report import charts
from veloxbench.report.answer import choice
from veloxbench.report.history import CHANGE_COLUMNS, bisection, change_cells, judged_changes, row_name
from veloxbench.report.page import DETAILS, by_model, method_names, render, slug
from veloxbench.report.points import BEST, CONTEXTS, QUOTED, points, rows
from veloxbench.report.templates import filled


@dataclass(frozen=True)
class Chart:
    """A chart of the page: its specification is ``specs[index]``."""

    index: int
    title: str
    label: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one model."""

    name: str
    anchor: str
    groups: tuple[str, ...]
    pareto: Chart | None
    more: tuple[Chart, ...]


def render_html(
    records: Sequence[Record],
    failures: Sequence[FailedMeasurement] = (),
    others: int = 0,
    depth: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole page.

    Args:
        records: as for :func:`veloxbench.report.page.render`, which writes every table; of a row that has several
            the page draws the history.
        failures: likewise.
        others: likewise.
        depth: what ``examples/sensitivity_by_depth.py`` measured of each model.
    """
    newest = newest_per_row(records)
    methods = method_names(newest)
    changes = change_points(records)
    specs: list[dict[str, Any]] = []
    board: list[dict[str, Any]] = []
    sections = list(_sections(records, methods, depth, changes, specs, board))
    return filled(
        "veloxbench.report",
        "page.html.j2",
        lead=list(_lead(newest)),
        sections=sections,
        change_columns=("model", *CHANGE_COLUMNS, "which commit"),
        changes=list(_changes(records, changes)),
        judged=judged_changes(changes) if changes.compared or changes.left_out else "",
        tables=_tables(render(records, failures, others, drawn=False)),
        methods=[
            (name, charts.MARKS[i % len(charts.MARKS)], i % len(charts.COLOURS)) for i, name in enumerate(methods)
        ],
        colours={name: theme["range"]["category"] for name, theme in charts.THEMES.items()},
        board=board,
        step=CONTEXTS.index(QUOTED),
        last_step=len(CONTEXTS) - 1,
        data=_in_script(
            {
                "specs": specs,
                "board": board,
                "contexts": CONTEXTS,
                "themes": {name: {**theme, "background": "transparent"} for name, theme in charts.THEMES.items()},
            }
        ),
        library=charts.vega_library() if specs else "",
        csv=_data_url("text/csv", _csv(board)),
        json=_data_url("application/json", json.dumps(board, indent=1)),
    )


def _lead(newest: Sequence[Record]) -> Iterator[str]:
    """Of each model one short sentence: the smallest cache that is good."""
    for model, of_model in by_model(table_rows(newest)).items():
        of_best = points(of_model)[BEST]
        point = choice(of_best)
        if point is not None and point.word is not None:
            tables = "" if point.footprint else ", tables not measured"
            bits = point.all_in(QUOTED)
            yield printable(f"{model}: {point.label} is {point.word.word} at {bits:.2f} bits a value{tables}.")
        elif any(one.quality for one in of_best):
            yield printable(f"{model}: nothing measured is good yet.")


def _sections(
    records: Sequence[Record],
    methods: Sequence[str],
    depth: Sequence[Mapping[str, Any]],
    changes: Changes,
    specs: list[dict[str, Any]],
    board: list[dict[str, Any]],
) -> Iterator[Section]:
    """The models, whose charts and rows are added to ``specs`` and ``board``."""

    def chart(made: Any, title: str, label: str) -> Chart:
        specs.append(charts.specification(made))
        return Chart(len(specs) - 1, title, label)

    histories = by_model(records)
    marks: dict[str, str] = {}
    for change in changes.changes:
        _, metric, values, grown, begun, _ = change_cells(change, False)
        told = f"{metric} {values}, {grown}, since {begun}"
        marks[change.after.id] = "; ".join(filter(None, (marks.get(change.after.id), told)))
    for model, of_model in by_model(table_rows(records)).items():
        name = printable(model)
        groups = points(of_model)
        drawn = list(rows(model, groups))
        arms = [row for row in drawn if row["kind"] == "arm" and (row["tag"] != "fp16" or row["group"] == BEST)]
        measured = any(row["tag"] != "fp16" for row in arms)
        board += arms if measured else []
        pareto = None
        if measured:
            told = f"{name}: KLD over size, a mark for each cache; the leaderboard has its figures"
            pareto = chart(charts.pareto(drawn, methods), name, told)
        more = [
            chart(made, title, f"{name}: {title}")
            for made, title in (
                (charts.speeds(drawn, methods), "Decode speed beside fp16"),
                (charts.by_position(of_model, methods), "Error by position"),
                (charts.phases(of_model), "Memory by phase"),
                (charts.layer_bits(of_model), "Bits by layer"),
                *(
                    (charts.sensitivity(e), "What each layer would lose at 2 bits")
                    for e in depth
                    if e["model"] == model
                ),
                *(
                    (made, f"History: {title}")
                    for title, made in charts.history(_series(histories[model]), marks).items()
                ),
            )
            if made is not None
        ]
        shown = tuple(dict.fromkeys(row["group"] for row in arms))
        yield Section(name, slug(model), shown if measured else (), pareto, tuple(more))


def _changes(records: Sequence[Record], changes: Changes) -> Iterator[tuple[tuple[str, ...], tuple[str, bool]]]:
    """Of each change the cells, its model's heading first, and the command that finds its commit."""
    headings = {record.id: model for model, of_model in by_model(records).items() for record in of_model}
    several = len(by_machine(records)) > 1
    for change in changes.changes:
        model = printable(headings.get(change.after.id, change.after.subject.model.name))
        yield (model, *change_cells(change, several)), bisection(change)


def _series(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of one row, oldest first, by a title."""
    series: dict[str, list[Record]] = {}
    several = len(by_machine(records)) > 1
    for record in sorted(records, key=lambda record: record.provenance.started):
        series.setdefault(row_name(record, several), []).append(record)
    return series


def _tables(text: str) -> str:
    """The Markdown page from its tables on, as HTML; raw HTML stays off: names of models and files are the user's."""
    body: str = MarkdownIt("commonmark", {"html": False}).enable("table").render(re.sub(r"<!--.*?-->\n*", "", text))
    body = re.sub(r"<h1>.*?</h1>\n*", "", body)
    body = re.sub(r"<(/?)h([23])>", lambda match: f"<{match[1]}h{int(match[2]) + 1}>", body)
    body = re.sub(rf'<a href="{DETAILS}/[^"]*">(.*?)</a>', r"\1", body)  # this file goes alone
    region = '<div class="table" tabindex="0" role="region" aria-label="table, scrolls sideways"><table>'
    numbered = iter(range(1, 10_000))
    body = re.sub("<table>", lambda _: region.replace("table,", f"table {next(numbered)},"), body)
    return body.replace("</table>", "</table></div>")


_COLUMNS = ("model", "arm", "group", "verdict", "kld", "p99_text", "top1_text", "ppl_text", "bits", "speed", "record")


def _csv(board: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(f"bits_at_{n}" for n in CONTEXTS), *(f"peak_gb_at_{n}" for n in CONTEXTS)])
    for row in board:
        needs = row["need_at"] or [None] * len(CONTEXTS)
        writer.writerow([*(row[name] for name in _COLUMNS), *row["bits_at"], *needs])
    return text.getvalue()


def _data_url(kind: str, text: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode('utf-8', 'backslashreplace')).decode()}"


def _in_script(value: Any) -> str:
    """JSON that ends no script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
