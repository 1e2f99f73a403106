"""docs/travelling.md from the record of a trial alone."""

from __future__ import annotations

import numpy as np
from tabulate import tabulate

from veloxbench.report.templates import filled
from veloxbench.trials.timing_resample import Rate
from veloxbench.trials.travelling import STRUCK, ErrorRates


def render(rates: ErrorRates) -> str:
    """The page."""
    return filled(
        "veloxbench.trials",
        "travelling.md.j2",
        settings=rates.settings,
        measured=rates.measured_gates,
        struck=STRUCK,
        gates=rates.drawn[0].passed.gates,
        noise=_noise(rates),
        tables={kind: _table(rates, kind) for kind in ("equal", "scaled", "damage")},
    )


def _noise(rates: ErrorRates) -> str:
    """What rounding alone moved, by arm: between the first setting and each other."""
    first, *others = rates.settings.samples.items()
    rows = []
    for name, arms in others:
        for arm, metrics in arms.items():
            row = [f"{name} for {first[0]}", arm]
            for metric in ("kld_mean", "delta_nll", "nll"):
                if metric in metrics:
                    base = np.asarray(first[1][arm][metric])
                    moved = np.asarray(metrics[metric]) - base
                    share = f" ({moved.std(ddof=1) / abs(base.mean()):.1%})" if metric != "nll" else ""
                    row.append(f"{moved.mean():+.2g} ± {moved.std(ddof=1):.2g}{share}")
                else:
                    row.append("")
            rows.append(row)
    headers = ["setting", "arm", "KLD: mean ± sd of a sequence", "ΔNLL", "NLL of fp16"]
    return tabulate(rows, headers=headers, tablefmt="github")


def _table(rates: ErrorRates, kind: str) -> str:
    rows = [
        [one.what, *(_shown(rate) for rate in (one.regress, one.inconclusive, one.passed))]
        for one in rates.drawn
        if one.kind == kind
    ]
    headers = ["beside the rounding", "regress (exit 1)", "inconclusive (exit 2)", "pass (exit 0)"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _shown(rate: Rate) -> str:
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"
