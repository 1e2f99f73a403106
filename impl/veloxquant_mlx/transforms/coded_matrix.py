"""Matrices that must stay in memory, at a few bits an entry: each row integers and a scale.

Rounding can be told which combinations of a row's entries matter: with a metric H the error e of a row costs e H eᵀ,
and what one entry loses by rounding is handed to the entries that are still free (GPTQ, arXiv 2210.17323, after
Hassibi & Stork's optimal brain surgeon).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.packing import MAX_CODE_BITS, pack_codes, packed_words, unpack_codes

Floats = NDArray[np.float64]

EXACT_BITS: Final = 16
"""The width at which rows are fp16 in place of codes, normalised to their largest entry."""

_CLIPS: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of a row's largest entry; the one of least square error is taken
_DAMPING: Final = 1e-3  # of the metric's mean diagonal, so that it can be inverted


def check_table_bits(bits: int, *, name: str = "bits") -> int:
    """Return ``bits`` when a matrix can be stored at that width: 2..8, or 16 for fp16.

    Raises:
        ValueError: another width, naming it.
    """
    if isinstance(bits, bool) or not (2 <= bits <= MAX_CODE_BITS or bits == EXACT_BITS):
        raise ValueError(f"{name} must be within 2..{MAX_CODE_BITS}, or {EXACT_BITS}, got {bits!r}")
    return bits


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """``[rows, columns]``: entry = scale of the row · (code − (2^bits − 1)/2), or · fp16 at 16 bits.

    Attributes:
        rows: of :func:`pack_codes` words, ``[rows, words]`` uint32; ``[rows, columns]`` fp16 at 16 bits.
        scales: ``[rows]`` bf16, whose range holds any fp32 scale; codes are fitted to the rounded scale.
        bits: of an entry.
        columns: entries of a row.
    """

    rows: mx.array
    scales: mx.array
    bits: int
    columns: int

    def __post_init__(self) -> None:
        check_table_bits(self.bits)
        width = self.columns if self.bits == EXACT_BITS else packed_words(self.columns, self.bits)
        dtype = mx.float16 if self.bits == EXACT_BITS else mx.uint32
        for name, array, shape, wanted in (
            ("rows", self.rows, (self.scales.size, width), dtype),
            ("scales", self.scales, (self.scales.size,), mx.bfloat16),
        ):
            if array.shape != shape or array.dtype != wanted:
                raise ValueError(f"{name} must be {wanted} {shape}, got {array.dtype} {array.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.scales.size, self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return int(self.rows.nbytes + self.scales.nbytes)

    def arrays(self) -> dict[str, mx.array]:
        """The arrays held, by attribute."""
        return {"rows": self.rows, "scales": self.scales}

    def dense(self) -> mx.array:
        """``[rows, columns]`` fp32."""
        scales = self.scales.astype(mx.float32)[:, None]
        if self.bits == EXACT_BITS:
            exact: mx.array = self.rows.astype(mx.float32) * scales
            return exact
        codes = unpack_codes(self.rows, self.bits, self.columns).astype(mx.float32)
        dense: mx.array = (codes - (2**self.bits - 1) / 2) * scales
        return dense


def _bf16(x: Floats) -> Floats:
    return np.array(mx.array(x.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32), dtype=np.float64)


def _row_scales(matrix: Floats, bits: int) -> Floats:
    """A scale a row: of a few clips of its largest entry the one whose rounding leaves the least square error."""
    top = (2**bits - 1) / 2
    peak = np.maximum(np.abs(matrix).max(axis=1), 1e-30)
    best, least = peak / top, np.full(len(matrix), np.inf)
    for clip in _CLIPS:
        scale = np.maximum(_bf16(clip * peak / top), 1e-30)
        error = np.square(matrix - scale[:, None] * _rounded(matrix / scale[:, None], top)).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.asarray(best)


def _rounded(x: Floats, top: float) -> Floats:
    """To the nearest of ``-top, -top + 1, …, top``."""
    return np.asarray(np.clip(np.round(x + top), 0, 2 * top) - top)


def code_matrix(matrix: Floats, bits: int, metric: Floats | None = None) -> CodedMatrix:
    """Store a matrix at ``bits`` an entry.

    Args:
        matrix: ``[rows, columns]``, finite.
        bits: 2..8, or 16 for fp16.
        metric: ``[columns, columns]`` symmetric, not negative: the error e of a row is to cost e H eᵀ; absent: e eᵀ.

    Raises:
        ValueError: another width, or a matrix that is not finite.
    """
    check_table_bits(bits)
    matrix = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError("matrix must be finite")
    columns = matrix.shape[1]
    if bits == EXACT_BITS:
        peaks = np.maximum(_bf16(np.abs(matrix).max(axis=1)), 1e-30)
        normal = (matrix / peaks[:, None]).astype(np.float16)
        return CodedMatrix(mx.array(normal), mx.array(peaks.astype(np.float32)).astype(mx.bfloat16), bits, columns)
    top = (2**bits - 1) / 2
    scales = _row_scales(matrix, bits)
    codes = np.empty_like(matrix)
    if metric is None:
        codes = _rounded(matrix / scales[:, None], top)
    else:
        order = np.argsort(-np.diag(metric))
        hessian = np.asarray(metric, dtype=np.float64)[np.ix_(order, order)]
        hessian = hessian + _DAMPING * max(float(np.trace(hessian)) / columns, 1e-30) * np.eye(columns)
        # Row i of the inverse's upper Cholesky factor says how the entries behind i make up for an error in i.
        upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
        left = matrix[:, order].copy()
        for i in range(columns):
            code = _rounded(left[:, i] / scales, top)
            codes[:, order[i]] = code
            error = (left[:, i] - code * scales) / upper[i, i]
            left[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    packed = pack_codes(mx.array((codes + top).astype(np.uint32)), bits)
    return CodedMatrix(packed, mx.array(scales.astype(np.float32)).astype(mx.bfloat16), bits, columns)
