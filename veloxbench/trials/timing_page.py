"""The page and the plot of the timing gate's measured error rates, from their record alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jinja2 import TemplateError
from matplotlib.axes import Axes
from tabulate import tabulate

from veloxbench.errors import IntegrityError
from veloxbench.report.templates import filled
from veloxbench.trials.plots import COLOURS, new_axes, svg
from veloxbench.trials.timing_resample import STRETCH, Effect, ErrorRates, Outcomes, Rate

PLOT = "gate-error-rates.svg"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _rate(rate: Rate) -> str:
    return f"{_percent(rate.value)} ({rate.count} of {rate.gates}; {_percent(rate.low)} to {_percent(rate.high)})"


Measured = tuple[float, float, float]


def _table(rates: ErrorRates, outcomes: Callable[[Effect], tuple[Measured, Outcomes] | None]) -> str:
    rows = []
    for effect in rates.effects:
        row = outcomes(effect)
        if row is None:
            continue
        (estimate, low, high), ended = row
        rows.append(
            (
                f"{100 * effect.slowdown:g}%",
                f"{_percent(estimate)} ({_percent(low)} to {_percent(high)})",
                _rate(ended.regress),
                _rate(ended.passed),
                _rate(ended.inconclusive),
                f"{ended.cost.starts[0]:.0f} / {ended.cost.starts[1]:.0f}",
                f"{ended.cost.seconds[0]:.0f} / {ended.cost.seconds[1]:.0f}",
            )
        )
    header = ("extra work", "measured slowdown", "regress", "pass", "inconclusive", "starts", "seconds")
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def render(rates: ErrorRates) -> str:
    """The page as Markdown.

    Raises:
        IntegrityError: the record lacks something that the page shows, or holds something else there.
    """
    try:
        return _page(rates)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, TemplateError) as error:
        raise IntegrityError(f"the error rates cannot be shown: {type(error).__name__}: {error}") from error


def _page(rates: ErrorRates) -> str:
    return filled(
        "veloxbench.trials",
        "timing.md.j2",
        series=rates.series,
        header=rates.series.header,
        decode=rates.series.header.decode,
        gate=rates.gate,
        clock=rates.clock,
        plain=rates.effects[0],
        stretch=STRETCH,
        plot=PLOT,
        resampled=_table(rates, lambda effect: (effect.measured, effect.resampled)),
        disjoint=_table(rates, lambda effect: (effect.measured, effect.disjoint) if effect.disjoint else None),
        live=_table(rates, lambda effect: (effect.live.measured, effect.live.outcomes) if effect.live else None),
        journals=rates.live,
    )


def plot(rates: ErrorRates) -> str:
    """How often the gate regresses and passes, by the measured slowdown, as SVG."""
    figure, axes = new_axes()
    passing, wrong, live_colour = COLOURS[0], COLOURS[1], COLOURS[4]
    slowdowns = [100 * effect.measured[0] for effect in rates.effects]
    _curve(axes, slowdowns, [effect.resampled.regress for effect in rates.effects], "regress", wrong, "o-")
    _curve(axes, slowdowns, [effect.resampled.passed for effect in rates.effects], "pass", passing, "s-")
    live = [(100 * e.live.measured[0], e.live.outcomes.regress) for e in rates.effects if e.live]
    if live:
        _curve(axes, [at for at, _ in live], [rate for _, rate in live], "regress, live", live_colour, "^")
    for value, name in ((rates.gate["margin"], "margin"), (rates.gate["detect"], "detect")):
        assert isinstance(value, float)
        axes.axvline(100 * value, color="0.6", linewidth=1, linestyle=":")
        axes.annotate(name, (100 * value, 1.03), ha="center", color="0.4", annotation_clip=False)
    axes.set(xlabel="slowdown by extra work, measured (%)", ylabel="share of gates", ylim=(-0.02, 1.02))
    return svg(figure)


def _curve(axes: Axes, x: Sequence[float], rates: Sequence[Rate], label: str, color: str, style: str) -> None:
    values = [rate.value for rate in rates]
    errors = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
    axes.errorbar(x, values, yerr=errors, fmt=style, label=label, color=color, capsize=3)
