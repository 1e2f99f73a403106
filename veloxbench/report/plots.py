"""Plots as SVG text, the same bytes every time: quality against resident bits, and decode speed beside fp16."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from veloxbench.errors import printable
from veloxbench.records.arm import REFERENCE
from veloxbench.records.record import Estimate, Record
from veloxbench.report.cells import method_alone, paired_ratio

# Okabe and Ito's colours keep apart for readers with any colour vision; the marker repeats the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SIZE = (7.2, 4.2)
_SERIES_PER_PLOT = len(COLOURS)


def quality_plot(records: Sequence[Record]) -> str | None:
    """KLD (log scale, with intervals) over bits_per_value: one line per method, lower left is better.

    Args:
        records: of one model, protocol and text.
    Returns:
        SVG text, or None where no arm but the reference was measured.
    """
    figure, axes = new_axes()
    for label, arms in _by_method(records).items():
        points = sorted(
            (arm.metrics["bits_per_value"].value, arm.metrics["kld_mean"])
            for arm in arms
            if arm.metrics.keys() >= {"bits_per_value", "kld_mean"} and arm.metrics["kld_mean"].value > 0
        )
        _line(axes, _shown(label), [x for x, _ in points], [y for _, y in points])
    if not axes.lines:
        return None
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits_per_value, everything resident counted")
    axes.set_ylabel("KLD from the fp16 cache, nats per token")
    return svg(figure)


def speed_plot(records: Sequence[Record]) -> str | None:
    """Decode speed over fp16's in the same run, arm by arm, a marker per depth; 1 is fp16. Intervals as in the table.

    Args:
        records: of one model; those without timings are passed over.
    """
    depths: dict[str, list[Record]] = {}
    for record in records:
        if record.subject.method.name != REFERENCE.name and "decode_speed_ratio" in record.metrics:
            depths.setdefault(f"{record.subject.settings['depth']} tokens", []).append(record)
    arms = list(dict.fromkeys(row.subject.method.label for rows in depths.values() for row in rows))
    if not arms:
        return None
    figure, axes = new_axes()
    for index, (label, rows) in enumerate(list(depths.items())[:_SERIES_PER_PLOT]):
        places = [arms.index(row.subject.method.label) + 0.15 * index for row in rows]
        _points(axes, label, [paired_ratio(row, "decode_speed_ratio")[0] for row in rows], places)
    axes.axvline(1.0, color="0.6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(arms)), map(_shown, arms))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("decode speed / fp16's")
    return svg(figure)


def _shown(label: str) -> str:
    """A name as Matplotlib shows it: a dollar sign begins no formula."""
    return printable(label).replace("$", r"\$")


def _by_method(records: Sequence[Record]) -> Mapping[str, list[Record]]:
    series: dict[str, list[Record]] = {}
    for record in records:
        if record.subject.method.name != REFERENCE.name and record.status == "measured":
            series.setdefault(method_alone(record), []).append(record)
    return dict(list(series.items())[:_SERIES_PER_PLOT])


def new_axes() -> tuple[Figure, Axes]:
    """An empty figure in the project's look; :func:`svg` makes text of it."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Axes, label: str, x: Sequence[float], y: Sequence[Estimate]) -> None:
    if x:
        axes.errorbar(x, [e.value for e in y], yerr=_bars(y), label=label, linewidth=1.5, **_look(axes))


def _points(axes: Axes, label: str, x: Sequence[Estimate], y: Sequence[float]) -> None:
    axes.errorbar([e.value for e in x], y, xerr=_bars(x), label=label, linestyle="none", **_look(axes))


def _look(axes: Axes) -> dict[str, Any]:
    index = len(axes.containers) % _SERIES_PER_PLOT
    return {"color": COLOURS[index], "marker": _MARKERS[index], "capsize": 3, "markersize": 5}


def _bars(estimates: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    """Lengths of the intervals below and above; a logarithmic axis has no zero to reach down to."""
    below = [0.0 if e.low is None else e.value - max(e.low, 0.02 * e.value) for e in estimates]
    return below, [0.0 if e.high is None else e.high - e.value for e in estimates]


def svg(figure: Figure) -> str:
    """The figure with its legend, as an ``<svg>`` element whose text stays text."""
    for axes in figure.axes:
        axes.legend(frameon=False)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "veloxbench", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"
