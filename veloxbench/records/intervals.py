"""Intervals for means, quantiles and paired ratios, and Holm's correction; scipy does the statistics.

The unit of resampling is the sequence (or the timing pair): tokens of one sequence are correlated, and
intervals that treat them as independent cover 48% where they promise 95%.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from veloxbench.errors import NotFiniteError
from veloxbench.records.record import Estimate

CONFIDENCE = 0.95
MIN_RATIO_PAIRS = 3
"""Pairs below which a ratio has no interval: Student's t of two spans 12.7 standard errors to either side."""


def finite(name: str, samples: ArrayLike) -> NDArray[np.float64]:
    """The samples as fp64.

    Raises:
        NotFiniteError: one of them is NaN or infinite; names the metric and the first place.
    """
    values = np.asarray(samples, dtype=np.float64)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        first = tuple(wrong[0].tolist())
        raise NotFiniteError(
            f"{name} is not finite: {len(wrong)} of {values.size} values, the first is {values[first]} at {list(first)}"
        )
    return values


def mean_interval(samples: ArrayLike, unit: str) -> Estimate:
    """Mean of independent samples with a Student-t interval (none for fewer than two samples)."""
    values = np.asarray(samples, dtype=np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Estimate(value=mean, unit=unit)
    error = values.std(ddof=1) / np.sqrt(values.size)
    half = float(special.stdtrit(values.size - 1, 0.5 + CONFIDENCE / 2) * error)
    return Estimate(value=mean, low=mean - half, high=mean + half, unit=unit, interval=f"Student t, n={values.size}")


def quantile_interval(groups: Sequence[NDArray[np.float64]], quantile: float, unit: str, seed: int = 0) -> Estimate:
    """A quantile of all positions, with a percentile interval from resampling whole groups (sequences)."""
    return bootstrap_interval(groups, lambda rows: float(np.quantile(np.concatenate(rows), quantile)), unit, seed)


def bootstrap_interval(
    groups: Sequence[NDArray[np.float64]],
    statistic: Callable[[Sequence[NDArray[np.float64]]], float],
    unit: str,
    seed: int = 0,
    resamples: int = 200,
) -> Estimate:
    """``statistic`` of all groups, with a percentile interval over resampled groups."""
    value = statistic(groups)
    n = len(groups)
    if n < 2:
        return Estimate(value=value, unit=unit)
    rng = np.random.default_rng(seed)
    draws = [statistic([groups[i] for i in rng.integers(0, n, n)]) for _ in range(resamples)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high), unit=unit, interval=f"bootstrap over {n} sequences")


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike) -> Estimate:
    """Geometric mean of paired ratios, with a Student-t interval on their logarithms (none below MIN_RATIO_PAIRS).

    Args:
        numerator: one positive figure per pair.
        denominator: the other figure of each pair, taken in the same moment on the same machine.
    """
    logs = np.log(np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64))
    on_logs = mean_interval(logs, "ln ratio")
    value = float(np.exp(on_logs.value))
    if logs.size < MIN_RATIO_PAIRS or on_logs.low is None or on_logs.high is None:
        return Estimate(value=value, unit="ratio")
    return Estimate(
        value=value,
        low=float(np.exp(on_logs.low)),
        high=float(np.exp(on_logs.high)),
        unit="ratio",
        interval=f"Student t on ln ratio, {logs.size} pairs",
    )


def median_interval(samples: ArrayLike, unit: str) -> Estimate:
    """Median with a distribution-free interval from order statistics (at least 95% where n allows it)."""
    values = np.sort(np.asarray(samples, dtype=np.float64))
    median = float(np.median(values))
    if values.size < 2:
        return Estimate(value=median, unit=unit)
    below = special.bdtr(np.arange(values.size + 1), values.size, 0.5)  # at most that many lie below the median
    k = max(int(np.searchsorted(below, (1 - CONFIDENCE) / 2)), 1)
    coverage = 1 - 2 * float(below[k - 1])
    return Estimate(
        value=median,
        low=float(values[k - 1]),
        high=float(values[values.size - k]),
        unit=unit,
        interval=f"order statistics, {coverage:.0%}, n={values.size}",
    )


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """Each hypothesis' level under Holm's step-down (1979) at a family-wise ``alpha``; 0 once a step was not rejected.

    A hypothesis is rejected where its p-value is at or below its level.
    """
    levels = [0.0] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        levels[index] = alpha / (len(p_values) - rank)
        if p_values[index] > levels[index]:
            break
    return levels
