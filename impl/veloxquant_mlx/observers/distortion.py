"""How far decoded vectors are from what was stored, layer by layer, beside theory."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from veloxquant_mlx.quantizers.base import Quantizer

N_QUERIES = 8
"""Random queries per observation against which inner products are compared."""


@functools.cache
def _queries(head_dim: int) -> mx.array:
    return mx.array(np.random.default_rng(head_dim).standard_normal((head_dim, N_QUERIES)).astype(np.float32))


@dataclass(frozen=True)
class DistortionRow:
    """One side of one layer at one width.

    Attributes:
        layer: index of the layer, None where the caller named none.
        role: "keys" or "values" for what every token is coded as, "outlier_keys" or "outlier_values" for the second
            code of flagged tokens, None likewise.
        quantizer: its name.
        code_bits: its width, None where it has none.
        n_vectors: vectors observed (tokens x heads).
        cosine: mean cosine similarity of a vector and its decoded form.
        relative_mse: energy of the error over energy of the vectors.
        expected_mse: the same in theory for Gaussian input, None where there is no theory.
        inner_product_mse: mean of ⟨y, error⟩² · d / (‖y‖²‖x‖²) over random queries y; as large as ``relative_mse``
            when the error favours no direction.
        gain: Σ⟨x, decoded⟩ / Σ‖x‖²: 1 for an unbiased quantizer, 1 - D for one of least squared error.
    """

    layer: int | None
    role: str | None
    quantizer: str
    code_bits: int | None
    n_vectors: int
    cosine: float
    relative_mse: float
    expected_mse: float | None
    inner_product_mse: float
    gain: float


@dataclass(frozen=True)
class DistortionReport:
    """What a :class:`DistortionObserver` saw, ordered by layer and side."""

    rows: tuple[DistortionRow, ...]

    def table(self) -> str:
        """The rows as a Markdown table."""
        return tabulate(
            [vars(row) for row in self.rows], headers="keys", tablefmt="github", floatfmt=".4f", missingval="–"
        )


@dataclass
class _Sums:
    """Of the vectors observed: how many, and the sums of what :meth:`DistortionObserver.observe` stacks."""

    expected: float | None
    n_vectors: int = 0
    stats: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))


@dataclass(eq=False)
class DistortionObserver:
    """Collects the error of every vector that caches (or an adaptive quantizer) encode.

    One observer may serve all layers: sums are kept per layer, side and width. A flagged token counts among the others
    and once more among its layer's outliers. Observing decodes what was just encoded and waits for the result, so it
    costs time; without an observer nothing is computed.
    """

    _sums: dict[tuple[int | None, str | None, str, int | None], _Sums] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> DistortionObserver:
        return self  # copies of a cache report to the same observer

    def observe(
        self,
        x: mx.array,
        decoded: mx.array,
        *,
        quantizer: Quantizer,
        layer: int | None = None,
        role: str | None = None,
    ) -> None:
        """Add vectors ``[B, H, T, D]`` and what they decode to."""
        x, decoded = x.astype(mx.float32), decoded.astype(mx.float32)
        head_dim = x.shape[-1]
        error = x - decoded
        signal = mx.sum(mx.square(x), axis=-1)
        aligned = mx.sum(x * decoded, axis=-1)
        lengths = mx.sqrt(signal * mx.sum(mx.square(decoded), axis=-1))
        queries = _queries(head_dim)
        hits = mx.square(error @ queries) / mx.sum(mx.square(queries), axis=0)
        stats = mx.stack(
            [
                mx.sum(mx.where(lengths > 0, aligned / mx.maximum(lengths, 1e-30), mx.where(signal > 0, 0.0, 1.0))),
                mx.sum(signal),
                mx.sum(mx.square(error)),
                mx.sum(hits) * (head_dim / N_QUERIES),
                mx.sum(aligned),
            ]
        )
        code_bits = getattr(quantizer, "code_bits", None)
        key = (layer, role, quantizer.name, code_bits)
        sums = self._sums.setdefault(key, _Sums(quantizer.expected_distortion(head_dim)))
        sums.n_vectors += signal.size
        sums.stats += np.array(stats)

    def report(self) -> DistortionReport:
        """What was observed so far."""
        order = sorted(self._sums, key=lambda k: (k[0] is None, k[0] or 0, k[1] or "", k[2], k[3] or 0))
        rows = []
        for key in order:
            sums = self._sums[key]
            cosine, energy, error, inner, aligned = sums.stats.tolist()
            signal = energy if energy > 0 else math.nan
            rows.append(
                DistortionRow(
                    *key,
                    n_vectors=sums.n_vectors,
                    cosine=cosine / sums.n_vectors if sums.n_vectors else math.nan,
                    relative_mse=error / signal,
                    expected_mse=sums.expected,
                    inner_product_mse=inner / signal,
                    gain=aligned / signal,
                )
            )
        return DistortionReport(tuple(rows))
