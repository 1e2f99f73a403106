"""Matplotlib's axes in the project's look, and figures as SVG text, the same bytes every time: for pages of trials."""

from __future__ import annotations

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours keep apart for readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_axes() -> tuple[Figure, Axes]:
    """An empty figure in the project's look; :func:`svg` makes text of it."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure with its legend, as an ``<svg>`` element whose text stays text."""
    for axes in figure.axes:
        axes.legend(frameon=False)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "veloxbench", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"
