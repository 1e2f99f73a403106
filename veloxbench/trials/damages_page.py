"""docs/damages.md from a study alone: what the quality gate notices, and what the exact tier does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter
from tabulate import tabulate

from veloxbench.gate.verdicts import Verdict
from veloxbench.records.suites import suite_row
from veloxbench.report.templates import filled
from veloxbench.trials.damages import GATES, Reach, Study, Trial
from veloxbench.trials.plots import COLOURS, new_axes, svg

PLOT = "damages.svg"
_SMALLEST_SHOWN = 0.1  # percent: a logarithmic axis has no zero


def render(study: Study, judged: Sequence[Trial], reaches: Mapping[str, Reach], n_arms: int) -> str:
    """The page.

    Args:
        study: the measured samples.
        judged: its damages, with what the gates said.
        reaches: what gates on each base can detect.
        n_arms: arms of the gate's profile.
    """
    n_gate = len(next(iter(study.samples.values()))[0].kld_mean)

    def above(trial: Trial, limit: float | None) -> bool:
        return limit is not None and trial.true.value > limit

    return filled(
        "veloxbench.trials",
        "damages.md.j2",
        study=study,
        sources=sorted({s.implementation for of_gates in study.samples.values() for s in of_gates}),
        n_arms=n_arms,
        n_gate=n_gate,
        n_gates=GATES,
        plot=PLOT,
        smallest_shown=_SMALLEST_SHOWN,
        limits=_limits(reaches, n_gate),
        table=_table(judged, n_gate),
        single=[trial for trial in judged if above(trial, reaches[trial.damage.base].per_gate)],
        pooled=[trial for trial in judged if above(trial, reaches[trial.damage.base].pooled)],
        harmful=[trial for trial in judged if trial.damage.harmful],
        controls=[trial for trial in judged if not trial.damage.harmful],
        counts=lambda some: Counter(verdict for trial in some for verdict in trial.gates),
    )


def plot(judged: Sequence[Trial], reaches: Mapping[str, Reach]) -> str:
    """How many gates call a damage a regression, by its true size beside what a gate detects, as SVG."""
    figure, axes = new_axes()
    for index, (base, limits) in enumerate(reaches.items()):
        harmful = [trial for trial in judged if trial.damage.base == base and trial.damage.harmful]
        sizes = [max(100 * trial.share, _SMALLEST_SHOWN) for trial in harmful]
        shares = [sum(verdict is Verdict.REGRESS for verdict in trial.gates) / GATES for trial in harmful]
        look: dict[str, Any] = {"color": COLOURS[index], "linestyle": "none"}
        axes.plot(sizes, shares, marker="o", label=f"{base}: each of {GATES} gates", **look)
        pooled = [float(trial.pooled is Verdict.REGRESS) for trial in harmful]
        axes.plot(sizes, pooled, marker="x", markersize=9, label=f"{base}: one of all sequences", **look)
        for limit, style in ((limits.per_gate, ":"), (limits.pooled, "--")):
            if limit is not None:
                axes.axvline(100 * limit / limits.kld, color=COLOURS[index], linewidth=1, linestyle=style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set(xlabel="true change, share of the undamaged KLD", ylabel="share of gates that regress", ylim=(-0.05, 1.05))
    return svg(figure)


def _limits(reaches: Mapping[str, Reach], n_gate: int) -> str:
    rows = []
    for base, limits in reaches.items():
        shares = [
            ("none" if x is None else f"{x:.2g} ({x / limits.kld:.0%})") for x in (limits.per_gate, limits.pooled)
        ]
        margin = suite_row("perplexity").per_sequence["kld_mean"].margin(limits.kld)
        rows.append((base, f"{limits.kld:.4g}", f"{margin:.2g}", f"{limits.spread:.2g}", *shares))
    headers = ("base", "KLD", "margin", "spread", f"{n_gate} sequences detect", f"{GATES * n_gate} sequences detect")
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def _table(judged: Sequence[Trial], n_gate: int) -> str:
    rows = [
        (
            trial.damage.summary,
            f"{trial.true.value:.2g} ({trial.true.low:.2g} to {trial.true.high:.2g})",
            f"{trial.share:+.1%}",
            ", ".join(f"{count} {verdict}" for verdict, count in Counter(trial.gates).most_common()),
            str(trial.pooled),
            f"{len(trial.exact)} metrics differ" if trial.exact else "equal",
            _caught(trial),
        )
        for trial in judged
    ]
    headers = (
        "damage",
        "true change",
        "of the KLD",
        f"{GATES} gates of {n_gate}",
        f"one gate of {GATES * n_gate}",
        "exact tier",
        "caught by",
    )
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def _caught(trial: Trial) -> str:
    tiers = ["exact"] if trial.exact else []
    regressed = sum(verdict is Verdict.REGRESS for verdict in trial.gates)
    if regressed:
        tiers.append("quality" if regressed == GATES else f"quality in {regressed} of {GATES}")
    elif trial.pooled is Verdict.REGRESS:
        tiers.append("quality of all sequences")
    return ", ".join(tiers) or "nothing"
