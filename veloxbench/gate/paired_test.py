"""Is the mean of paired differences above a margin, or below it? Two tests, of which the larger p-value stands."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

ALPHA = 0.01
"""Family-wise rate of false regressions over a tier."""

FALSE_PASS = 0.05
"""How often a metric may pass whose true change is the margin. All must pass, so it needs no correction."""

POWER = 0.95
"""The smallest detectable change is the one that is called a regression this often."""

MIN_SEQUENCES = 16
"""Fewer sequences cannot reach significance after Holm: 16 have 65536 sign flips."""

ALL_FLIPS_UP_TO = 16
RANDOM_FLIPS = 65_536


@dataclass(frozen=True)
class Paired:
    """A test of paired differences against a margin: of being above it, and of being below.

    Attributes:
        p_regress: p-value of "the mean change is at most the margin"; small where it regressed.
        p_pass: p-value of "the mean change is at least the margin"; small where it passes.
    """

    mean: float
    standard_error: float
    n: int
    margin: float
    p_regress: float
    p_pass: float

    def bound(self, level: float, sign: int) -> float:
        """One-sided Student-t bound of the mean at ``1 - level``: lower for sign -1, upper for +1."""
        if self.standard_error == 0:
            return self.mean
        return self.mean + sign * _above(level, self.n) * self.standard_error


def paired_test(differences: Sequence[float] | NDArray[np.float64], margin: float) -> Paired:
    """Student-t and sign-flip test of the mean difference against ``margin``; the larger p-value of the two stands.

    Differences that are all equal (an unchanged program on the same kind of machine gives zeros) have no
    spread to test against: the comparison with the margin is then certain.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    return paired_tests(np.atleast_2d(np.asarray(differences, dtype=np.float64)), [margin])[0]


def paired_tests(differences: NDArray[np.float64], margins: Sequence[float]) -> list[Paired]:
    """:func:`paired_test` of many metrics at once: ``differences`` is ``[metrics, n]``, each row has its margin."""
    n = differences.shape[1]
    for values in differences if n < 2 else differences[~np.isfinite(differences).all(axis=1)]:
        raise ValueError(f"a paired test needs two finite differences or more, got {values.tolist()}")
    means, flat = differences.mean(axis=1), np.ptp(differences, axis=1) == 0
    errors = np.where(flat, 0.0, differences.std(axis=1, ddof=1) / math.sqrt(n))
    away = np.divide(np.asarray(margins) - means, errors, out=np.zeros(len(errors)), where=~flat)
    students = special.stdtr(n - 1, away), special.stdtr(n - 1, -away)
    rows = zip(differences, margins, *(each.tolist() for each in (means, errors, flat, *students)), strict=True)
    return [
        Paired(mean, 0.0, n, margin, float(mean <= margin), float(mean > margin))
        if certain
        else Paired(
            mean,
            error,
            n,
            margin,
            _p_value(greater, values, margin, "greater"),
            _p_value(less, values, margin, "less"),
        )
        for values, margin, mean, error, certain, greater, less in rows
    ]


def _above(level: float, n: int) -> float:
    """What Student's t of ``n`` values exceeds with a probability of ``level``."""
    return -float(special.stdtrit(n - 1, level))


Alternative = Literal["less", "greater"]


def _p_value(student: float, values: NDArray[np.float64], margin: float, alternative: Alternative) -> float:
    """The larger of the two tests' p-values; the costly test is left out where Student's rejects nothing anyway."""
    return student if student > FALSE_PASS else max(student, _sign_flip(values, margin, alternative))


def _sign_flip(values: NDArray[np.float64], margin: float, alternative: Alternative) -> float:
    """One-sided sign-flip permutation test of the mean (Fisher 1935): exact up to 16 values, random flips above."""
    differences = values - margin if alternative == "greater" else margin - values
    observed = float(differences.sum())
    # flips that only round differently from the observed signs count as equal to them
    limit = observed - 1e-12 * float(np.abs(differences).sum())
    if values.size <= ALL_FLIPS_UP_TO:
        return float(_reached(differences, limit) / 2**values.size)
    reached = _random_flips(values.size) @ differences >= limit
    return float((reached.sum() + 1) / (reached.size + 1))


def _reached(differences: NDArray[np.float64], limit: float) -> int:
    """How many of all sign flips give a sum of at least ``limit``: sums of one half, looked up among the other's."""
    half = differences.size // 2
    some, others = (_all_flips(part.size) @ part for part in (differences[:half], differences[half:]))
    return int(others.size * some.size - np.searchsorted(np.sort(others), limit - some).sum())


@functools.cache
def _all_flips(n: int) -> NDArray[np.float64]:
    """All sign vectors of length ``n``: ``[2**n, n]`` of ±1."""
    return np.asarray(1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1))


@functools.cache
def _random_flips(n: int) -> NDArray[np.float64]:
    """Many random sign vectors of length ``n``: ``[flips, n]`` of ±1."""
    return np.asarray(1.0 - 2.0 * np.random.default_rng(0).integers(0, 2, size=(RANDOM_FLIPS, n)))


def smallest_detectable(baseline: Sequence[float], margin: float, n_tests: int, spread: float = 0.0) -> float | None:
    """The mean change that the gate calls a regression with :data:`POWER`; None where no change is large enough.

    A real change is taken to scale with the damage of each sequence, so that its differences vary between
    sequences as the baseline does (its coefficient of variation), on top of ``spread``: whatever changes a number
    also draws the quantization noise anew.

    Args:
        baseline: the metric per sequence.
        margin: what the change must exceed.
        n_tests: tests in the family; the first step of Holm divides by it.
        spread: standard deviation of the differences that is there without any change of quality.
    """
    values = np.asarray(baseline, dtype=np.float64)
    return detectable_change(values.size, float(values.mean()), float(values.std(ddof=1)), margin, n_tests, spread)


def detectable_change(
    n: int, mean: float, deviation: float, margin: float, n_tests: int, spread: float
) -> float | None:
    """:func:`smallest_detectable` of a baseline whose mean and standard deviation are known."""
    if mean == 0:
        return None
    variation = deviation / abs(mean)
    # the change at which (change - margin) / error is that shift: a quadratic equation, for the error grows with it
    shift = _detected_shift(n, n_tests)
    slope = n - (shift * variation) ** 2
    if slope <= 0:
        return None
    root = shift * math.sqrt(n * spread**2 + variation**2 * (n * margin**2 - (shift * spread) ** 2))
    change = (n * margin + root) / slope
    return change if change <= FARTHEST * margin else None


FARTHEST = 1e4
"""Margins beyond which a change that is detected is none that anybody waits for."""


@functools.cache
def _detected_shift(n: int, n_tests: int) -> float:
    """By how many standard errors a change must exceed the margin to be called a regression with :data:`POWER`."""
    critical = _above(ALPHA / max(n_tests, 1), n)

    def missing_power(shift: float) -> float:
        missed = float(special.nctdtr(n - 1, shift, critical))
        if math.isnan(missed):  # far out, where the normal distribution serves as well
            missed = float(special.ndtr(critical - shift))
        return POWER - 1.0 + missed

    from scipy import optimize  # half a second, which judging alone does without

    return float(optimize.brentq(missing_power, 0.0, 1e6, rtol=1e-6))
