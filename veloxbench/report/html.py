"""The page as one HTML file that needs nothing else: the Markdown page's own tables, with plots."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt

from veloxbench.errors import printable
from veloxbench.records.record import FailedMeasurement, Record
from veloxbench.records.selection import table_rows
from veloxbench.report.page import by_model, render
from veloxbench.report.plots import quality_plot, speed_plot
from veloxbench.report.tables import quality_groups
from veloxbench.report.templates import filled


@dataclass(frozen=True)
class Plot:
    """A plot and the sentence under it."""

    svg: str
    caption: str


def render_html(records: Sequence[Record], failures: Sequence[FailedMeasurement] = (), others: int = 0) -> str:
    """The whole page.

    Args:
        records: as for :func:`veloxbench.report.page.render`, which writes every figure that stands here.
        failures: likewise.
        others: likewise.
    """
    text = re.sub(r"<!--.*?-->\n*", "", render(records, failures, others), flags=re.DOTALL)
    # raw HTML stays off: names of models and files are the user's text
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    headings = [
        html.unescape(heading.removeprefix("## ")) for heading in text.splitlines() if heading.startswith("## ")
    ]
    start, rest = _anchored(body).split("<h2", 1) if headings else (body, "")
    return filled(
        "veloxbench.report",
        "page.html.j2",
        start=start,
        rest="<h2" + rest if headings else "",
        headings=[(slug(heading), heading) for heading in headings],
        plots=list(plots(records)),
    )


def plots(records: Sequence[Record]) -> Iterator[Plot]:
    """For each model: quality over bits by protocol, then speed."""
    for model, of_model in by_model(table_rows(records)).items():
        for group in quality_groups(of_model).values():
            svg = quality_plot(group)
            if svg:
                subject = group[0].subject
                caption = (
                    f"{model}, {subject.protocol} protocol on {subject.settings['sequences']} sequences of "
                    f"{subject.text.name}: quality lost over bits held. Lower left is better."
                )
                yield Plot(svg, printable(caption))
        svg = speed_plot(of_model)
        if svg:
            yield Plot(svg, printable(f"{model}: decode speed beside fp16 in the same run. Above 1 is faster."))


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _anchored(body: str) -> str:
    def anchor(match: re.Match[str]) -> str:
        return f'<h2 id="{slug(html.unescape(match[1]))}">{match[1]}</h2>'

    tables = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return re.sub(r"<h2>(.*?)</h2>", anchor, tables)
