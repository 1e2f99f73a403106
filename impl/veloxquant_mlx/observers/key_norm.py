"""Tokens whose keys have an unusual norm, found as they arrive."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

Tail = Literal["high", "low", "both"]

WARM_UP: Final = 16
"""Norms that the rolling statistics need before a token can be called unusual."""


@dataclass(frozen=True)
class KeyNormRow:
    """One layer's tokens.

    Attributes:
        layer: index of the layer.
        token_count: tokens seen.
        outlier_count: tokens flagged.
        outlier_fraction: flagged over seen.
        mean_norm: mean norm of all tokens.
        mean_outlier_norm: mean norm of the flagged tokens; NaN without any.
    """

    layer: int
    token_count: int
    outlier_count: int
    outlier_fraction: float
    mean_norm: float
    mean_outlier_norm: float


@dataclass(frozen=True)
class KeyNormReport:
    """All layers together, and each in ``layers``; an outlier of several layers counts in each."""

    outlier_count: int
    outlier_fraction: float
    mean_outlier_norm: float
    layers: tuple[KeyNormRow, ...]

    def table(self) -> str:
        """The layers as a Markdown table."""
        return tabulate([vars(row) for row in self.layers], headers="keys", tablefmt="github", floatfmt=".4f")


@dataclass
class _Totals:
    tokens: int = 0
    norms: float = 0.0
    outliers: int = 0
    outlier_norms: float = 0.0


@dataclass(eq=False)
class KeyNormTracker:
    """Rolling statistics of one sequence (or lockstep batch) in one layer.

    Made by :meth:`KeyNormObserver.tracker`, or without an observer by a cache that was loaded.
    """

    observer: KeyNormObserver | None
    layer: int
    _windows: list[_Window] = field(default_factory=list)

    def flag(self, keys: mx.array) -> NDArray[np.bool_]:
        """Flag the unusual tokens of ``[B, H, T, D]``, in order of arrival: ``[B, T]``.

        Raises:
            RuntimeError: there is no observer.
        """
        observer = self.observer
        if observer is None:
            raise RuntimeError(
                f"layer {self.layer} keeps outlier tokens, and no outlier_observer flags them: give one to "
                f"load_prompt_cache, or to the cache's attach_outlier_observer"
            )
        norms = mx.sqrt(mx.sum(mx.square(keys.astype(mx.float32)), axis=(1, 3)))
        rows: list[list[float]] = np.array(norms).astype(float).tolist()
        while len(self._windows) < len(rows):
            self._windows.append(_Window(observer.window_size))
        flags = [
            [observer.flag_norm(norm, window, self.layer) for norm in row]
            for row, window in zip(rows, self._windows, strict=True)
        ]
        return np.array(flags, dtype=np.bool_).reshape(norms.shape)

    def rows(self, index: slice) -> None:
        """Keep only some sequences of the batch."""
        self._windows = self._windows[index]

    def attach(self, observer: KeyNormObserver) -> None:
        """Judge the tokens to come by ``observer``, beside the last ``window_size`` norms that are known."""
        self.observer = observer
        self._refill([list(window.entries) for window in self._windows])

    def norms(self) -> mx.array | None:
        """The norms in the windows, ``[B, n]`` fp32, for a saved cache; None before the first token."""
        return mx.array([list(window.entries) for window in self._windows]) if self._windows else None

    def load_norms(self, norms: mx.array | None) -> None:
        """Take what :meth:`norms` gave."""
        self._refill([] if norms is None else np.array(norms).astype(float).tolist())

    def _refill(self, rows: list[list[float]]) -> None:
        sizes = [len(row) if self.observer is None else self.observer.window_size for row in rows]
        self._windows = [_Window(size, row) for size, row in zip(sizes, rows, strict=True)]


class _Window:
    """Mean and deviation of the last ``size`` entries, by running sums."""

    def __init__(self, size: int, entries: Sequence[float] = ()) -> None:
        self.entries: deque[float] = deque()
        self._size = size
        self._sum = 0.0
        self._squares = 0.0
        for entry in entries:
            self.add(entry)

    def add(self, value: float) -> None:
        self.entries.append(value)
        self._sum += value
        self._squares += value * value
        if len(self.entries) > self._size:
            oldest = self.entries.popleft()
            self._sum -= oldest
            self._squares -= oldest * oldest

    def __len__(self) -> int:
        return len(self.entries)

    def moments(self) -> tuple[float, float]:
        mean = self._sum / len(self.entries)
        return mean, math.sqrt(max(0.0, self._squares / len(self.entries) - mean * mean))


@dataclass(eq=False)
class KeyNormObserver:
    """Flags a token whose key norm lies more than ``outlier_threshold`` deviations from the rolling mean.

    The norm is that of the token's keys of all KV heads together. Mean and deviation are those of the
    ``window_size`` tokens before it in the same layer and sequence; nothing is flagged before 16 have been seen. A
    norm beyond the threshold, on either side, enters the window clipped to it, so that one outlier does not hide the
    next, yet a lasting change of level is learnt. One observer may be shared by all layers.

    Given to ``KVCacheConfig(outlier_observer=..., outlier_bits=...)``, the flagged tokens are kept at
    ``outlier_bits``.

    Args:
        outlier_threshold: deviations, above 0.
        window_size: tokens in the rolling window, at least 16.
        tail: "high" (the default), "low" (small keys draw attention: arXiv 2406.11430) or "both". No tail finds the
            attention sink at the start, which falls into the warm-up: ``KVCacheConfig(sinks=1)`` keeps it.

    Raises:
        ValueError: an argument outside its range, naming it.
    """

    outlier_threshold: float = 3.0
    window_size: int = 256
    tail: Tail = "high"
    _totals: dict[int, _Totals] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.outlier_threshold > 0:
            raise ValueError(f"outlier_threshold must be above 0, got {self.outlier_threshold}")
        if self.window_size < WARM_UP:
            raise ValueError(f"window_size must be at least {WARM_UP}, got {self.window_size}")
        if self.tail not in ("high", "low", "both"):
            raise ValueError(f"tail must be 'high', 'low' or 'both', got {self.tail!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyNormObserver:
        return self  # copies of a cache report to the same observer

    def tracker(self, layer: int) -> KeyNormTracker:
        """Statistics for one more sequence (or lockstep batch) of a layer, reporting here."""
        return KeyNormTracker(self, layer)

    def flag_norm(self, norm: float, window: _Window, layer: int) -> bool:
        """Judge one token and enter it into its window and the layer's totals."""
        totals = self._totals.setdefault(layer, _Totals())
        totals.tokens += 1
        if not math.isfinite(norm):  # no measure for the tokens to come
            return False
        totals.norms += norm
        flagged = False
        entry = norm
        if len(window) >= WARM_UP:
            mean, deviation = window.moments()
            # a deviation below 1e-6 of the mean is rounding, not spread
            reach = self.outlier_threshold * max(deviation, 1e-6 * mean)
            high = self.tail != "low" and norm > mean + reach
            low = self.tail != "high" and norm < mean - reach
            flagged = high or low
            entry = min(max(norm, mean - reach), mean + reach)
        window.add(entry)
        if flagged:
            totals.outliers += 1
            totals.outlier_norms += norm
        return flagged

    def report(self) -> KeyNormReport:
        """What was observed so far."""
        rows = tuple(
            KeyNormRow(
                layer=layer,
                token_count=totals.tokens,
                outlier_count=totals.outliers,
                outlier_fraction=totals.outliers / totals.tokens,
                mean_norm=totals.norms / totals.tokens,
                mean_outlier_norm=totals.outlier_norms / totals.outliers if totals.outliers else math.nan,
            )
            for layer, totals in sorted(self._totals.items())
        )
        tokens = sum(totals.tokens for totals in self._totals.values())
        outliers = sum(totals.outliers for totals in self._totals.values())
        norms = sum(totals.outlier_norms for totals in self._totals.values())
        return KeyNormReport(
            outlier_count=outliers,
            outlier_fraction=outliers / tokens if tokens else math.nan,
            mean_outlier_norm=norms / outliers if outliers else math.nan,
            layers=rows,
        )
