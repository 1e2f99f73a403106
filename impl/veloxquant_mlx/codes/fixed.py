"""A code of fixed width for each coefficient: plain packed words, every token readable alone.

A coefficient is divided by its scale and takes one of ``2**width`` levels of a fitted codebook, which coefficients of
like shape (tails) share; widths from 0 to 8 come from reverse water-filling on measured distortions. A token is a row
of 32-bit words: coefficient j lies at bits ``[sum(widths[:j]), sum(widths[:j + 1]))``, little-endian, and may straddle
words; the bits behind the last one are zero.

Cost: ``32 ceil(sum(widths) / 32) / d`` bits a value, nothing per block. A code of fixed width clips the rare large
coefficient that an entropy code would pay for: heavy tails cost it .5 bit and more (docs/log.md).

Sources: Lloyd 1982, Max 1960 (codebooks); Huang & Schultheiss 1963, Shoham & Gersho 1988 (widths).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from veloxquant_mlx.allocators.allocation import greedy_choices
from veloxquant_mlx.codes import native

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

MAX_WIDTH: Final = 8
WIDTHS: Final = range(MAX_WIDTH + 1)
WORD_BITS: Final = 32
BOOK_SIZE: Final = 2 ** (MAX_WIDTH + 1) - 2
"""Levels of all widths: those of width b begin at ``2**b - 2``."""
LLOYD_STEPS: Final = 60
MOST_SAMPLES: Final = 1 << 18


def _book(width: int) -> slice:
    return slice(2**width - 2, 2 ** (width + 1) - 2)


def lloyd(samples: ArrayLike, n_levels: int) -> Floats:
    """Levels of least mean squared error for samples of a symmetric distribution, by Lloyd's iteration.

    Raises:
        ValueError: fewer distinct magnitudes than half the levels.
    """
    x = np.sort(np.abs(np.asarray(samples, np.float64).ravel()))
    n_half = n_levels // 2
    if np.unique(x).size < n_half:
        raise ValueError(f"{n_levels} levels need as many different samples, got {2 * np.unique(x).size}")
    sums = np.concatenate([[0.0], np.cumsum(x)])
    # cells of equal integral of density**(1/3) (Panter & Dite): quantiles of a power of the rank do for a start
    levels = np.quantile(x, 1 - (1 - (np.arange(n_half) + 0.5) / n_half) ** 2)
    levels = np.maximum.accumulate(levels + 1e-12 * np.arange(n_half))
    for _ in range(LLOYD_STEPS):
        edges = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], edges, [x.size]])
        count = np.diff(edges)
        moved = np.where(count > 0, np.diff(sums[edges]) / np.maximum(count, 1), levels)
        if np.allclose(moved, levels, rtol=1e-6, atol=0):
            break
        levels = moved
    return np.concatenate([-levels[::-1], levels])


def fit_books(samples: Sequence[ArrayLike]) -> Floats32:
    """``[n_shapes, BOOK_SIZE]``: levels of widths 1 to 8, ascending, for samples of each shape (of variance 1)."""
    books = np.zeros((len(samples), BOOK_SIZE), np.float32)
    for row, x in zip(books, samples, strict=True):
        for width in WIDTHS[1:]:
            row[_book(width)] = lloyd(x, 2**width)
    return books


def _indices(x: Floats32, book: Floats32) -> NDArray[np.uint32]:
    """Nearest levels; the upper one where two are as near."""
    return np.searchsorted((book[1:] + book[:-1]) * np.float32(0.5), x, side="right").astype(np.uint32)


@dataclass(frozen=True, eq=False)
class FixedCode:
    """The fixed code of one layer.

    Attributes:
        widths: ``[d]`` uint8, bits of each coefficient, 0..8; a coefficient of width 0 reads as zero.
        scales: ``[d]`` fp32, what a coefficient is divided by.
        shapes: ``[d]`` uint8, each coefficient's row of ``books``.
        books: ``[n_shapes, BOOK_SIZE]`` fp32 levels, shared by layers.

    Raises:
        ValueError: an array outside of that.
    """

    widths: NDArray[np.uint8]
    scales: Floats32
    shapes: NDArray[np.uint8]
    books: Floats32 = field(repr=False)

    def __post_init__(self) -> None:
        for name, dtype in (("widths", np.uint8), ("scales", np.float32), ("shapes", np.uint8), ("books", np.float32)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        if self.widths.ndim != 1 or not self.widths.shape == self.scales.shape == self.shapes.shape:
            raise ValueError("widths, scales and shapes must be [d] each")
        if self.widths.size and self.widths.max() > MAX_WIDTH:
            raise ValueError(f"widths must lie in 0..{MAX_WIDTH}, got {self.widths.max()}")
        if not (np.isfinite(self.scales) & (self.scales > 0)).all():
            raise ValueError("scales must be finite and positive")
        if self.books.ndim != 2 or self.books.shape[1] != BOOK_SIZE or not np.isfinite(self.books).all():
            raise ValueError(f"books must be finite [shapes, {BOOK_SIZE}], got {self.books.shape}")
        if self.shapes.size and self.shapes.max() >= len(self.books):
            raise ValueError(f"shapes must lie below {len(self.books)}, got {self.shapes.max()}")

    @property
    def n_bits(self) -> int:
        """Bits of a token before its row is filled up to whole words."""
        return int(self.widths.sum(dtype=np.int64))

    @property
    def n_words(self) -> int:
        """Words of a token."""
        return -(-self.n_bits // WORD_BITS)

    @property
    def bits_per_value(self) -> Fraction:
        """Real cost of a coefficient: the words of a token over d."""
        return Fraction(WORD_BITS * self.n_words, len(self.widths))

    @property
    def nbytes(self) -> int:
        """Bytes of widths, scales and shapes; the books are counted once, apart."""
        return self.widths.nbytes + self.scales.nbytes + self.shapes.nbytes

    @cached_property
    def offsets(self) -> NDArray[np.int32]:
        """``[d]``: the first bit of each coefficient."""
        return np.ascontiguousarray(np.cumsum(self.widths, dtype=np.int32) - self.widths, np.int32)

    @cached_property
    def first_levels(self) -> NDArray[np.int32]:
        """``[d]``: where each coefficient's levels begin in the flat books."""
        return np.ascontiguousarray(self.shapes.astype(np.int32) * BOOK_SIZE + (1 << self.widths.astype(np.int32)) - 2)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name, for safetensors; books apart."""
        return {"widths": self.widths, "scales": self.scales, "shapes": self.shapes}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike], books: ArrayLike) -> FixedCode:
        """The inverse of :meth:`to_arrays`."""
        missing = [name for name in ("widths", "scales", "shapes") if name not in arrays]
        if missing:
            raise ValueError(f"arrays lacks {missing[0]!r} of the fixed code")
        widths, scales, shapes = (np.asarray(arrays[name]) for name in ("widths", "scales", "shapes"))
        return cls(widths, scales, shapes, np.asarray(books))

    def encode(self, y: ArrayLike) -> NDArray[np.uint32]:
        """Pack coefficients ``[T, d]`` into ``[T, n_words]`` uint32.

        Raises:
            ValueError: a wrong shape, or coefficients that are not finite.
        """
        array = np.ascontiguousarray(y, np.float32)
        if array.ndim != 2 or array.shape[1] != len(self.widths):
            raise ValueError(f"y must be [T, {len(self.widths)}], got {array.shape}")
        if not np.isfinite(array).all():
            where = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ValueError(f"y{where} = {array[tuple(where)]} is not finite")
        library = native.library()
        if library is None:
            return self._encode_reference(array)
        return native.encode_fixed(library, array, self)

    def decode(self, words: ArrayLike) -> Floats32:
        """Coefficients ``[T, d]`` fp32 of packed tokens ``[T, n_words]``: any rows, in any order.

        Raises:
            ValueError: words of another code.
        """
        array = np.ascontiguousarray(words, np.uint32)
        if array.ndim != 2 or array.shape[1] != self.n_words:
            raise ValueError(f"words must be [T, {self.n_words}], got {array.shape}")
        library = native.library()
        if library is None:
            return self._decode_reference(array)
        return native.decode_fixed(library, array, self)

    def _encode_reference(self, y: Floats32) -> NDArray[np.uint32]:
        words = np.zeros((len(y), self.n_words + 1), np.uint64)
        for j in np.flatnonzero(self.widths):
            level = self.books[self.shapes[j], _book(int(self.widths[j]))]
            code = _indices(y[:, j] / self.scales[j], level).astype(np.uint64)
            word, shift = divmod(int(self.offsets[j]), WORD_BITS)
            placed = code << np.uint64(shift)
            words[:, word] |= placed & np.uint64(0xFFFFFFFF)
            words[:, word + 1] |= placed >> np.uint64(WORD_BITS)
        return np.ascontiguousarray(words[:, : self.n_words]).astype(np.uint32)

    def _decode_reference(self, words: NDArray[np.uint32]) -> Floats32:
        y = np.zeros((len(words), len(self.widths)), np.float32)
        padded = np.pad(words, ((0, 0), (0, 1))).astype(np.uint64)
        for j in np.flatnonzero(self.widths):
            width = int(self.widths[j])
            word, shift = divmod(int(self.offsets[j]), WORD_BITS)
            pair = padded[:, word] | (padded[:, word + 1] << np.uint64(WORD_BITS))
            code = (pair >> np.uint64(shift)) & np.uint64((1 << width) - 1)
            y[:, j] = self.books[self.shapes[j], _book(width)][code] * self.scales[j]
        return y


def allocate_widths(
    losses: Sequence[ArrayLike], target_bits: float, weights: ArrayLike | None = None
) -> list[NDArray[np.uint8]]:
    """Widths of all layers' coefficients by reverse water-filling: the least summed loss within the bits.

    The steps of all coefficients run along their lower convex hulls, the best first
    (:func:`veloxquant_mlx.allocators.allocation.greedy_choices`); then every layer is rounded to whole words, and the
    words that this frees go to the layers that lost most.

    Args:
        losses: for each layer ``[d, 9]``, the loss of each coefficient at widths 0 to 8.
        target_bits: bits_per_value over all layers, whole words counted.
        weights: ``[layers]``, what a layer's loss counts; equal if absent.

    Returns:
        For each layer ``[d]`` uint8.

    Raises:
        ValueError: losses that are not finite or negative, or a target that is not within 0..8.
    """
    tables = [np.asarray(layer, np.float64) for layer in losses]
    if not tables or any(table.ndim != 2 or table.shape[1] != len(WIDTHS) for table in tables):
        raise ValueError(f"losses must be [d, {len(WIDTHS)}] for each layer")
    if not 0 <= target_bits <= MAX_WIDTH:
        raise ValueError(f"target_bits={target_bits} must lie in 0..{MAX_WIDTH}")
    counts = np.ones(len(tables)) if weights is None else np.asarray(weights, np.float64)
    tables = [table * count for table, count in zip(tables, counts, strict=True)]
    sizes = [len(table) for table in tables]
    n_words = int(Fraction(str(target_bits)) * sum(sizes) // WORD_BITS)
    chosen = np.array(_greedy(np.concatenate(tables), n_words * WORD_BITS))
    ends = np.cumsum(sizes)
    wanted = np.array([chosen[end - size : end].sum() for size, end in zip(sizes, ends, strict=True)]) / WORD_BITS
    words = np.floor(wanted).astype(int)
    most = [size * MAX_WIDTH // WORD_BITS for size in sizes]
    for layer in np.argsort(words - wanted, kind="stable"):
        if words.sum() < n_words and words[layer] < most[layer] and wanted[layer] > words[layer]:
            words[layer] += 1
    return [np.array(_greedy(table, int(n) * WORD_BITS), np.uint8) for table, n in zip(tables, words, strict=True)]


def _greedy(losses: Floats, n_bits: int) -> tuple[int, ...]:
    costs = [tuple(Fraction(width) for width in WIDTHS)] * len(losses)
    return greedy_choices(costs, list(losses), Fraction(n_bits))


def _kurtosis(x: Floats32) -> Floats:
    return np.asarray(np.mean(np.square(np.square(x, dtype=np.float64)), axis=0))


def fit_fixed(
    layers: Sequence[ArrayLike], target_bits: float, *, n_shapes: int = 4, weights: ArrayLike | None = None
) -> tuple[FixedCode, ...]:
    """Scales, codebooks and widths for coefficients like these.

    Args:
        layers: for each layer ``[n, d]`` calibration coefficients, zero mean.
        target_bits: bits_per_value over all layers.
        n_shapes: groups of coefficients, by kurtosis, with codebooks of their own.
        weights: ``[layers]``, what a squared error of each layer counts.

    Returns:
        Each layer's code; they share ``books``.

    Raises:
        ValueError: too few samples for the codebooks, or as :func:`allocate_widths`.
    """
    arrays = [np.asarray(layer, np.float32) for layer in layers]
    scales = [
        np.maximum(np.sqrt(np.square(x, dtype=np.float64).mean(axis=0)), 1e-30).astype(np.float32) for x in arrays
    ]
    unit = [x / scale for x, scale in zip(arrays, scales, strict=True)]
    tails = [_kurtosis(x) for x in unit]
    edges = np.quantile(np.concatenate(tails), np.arange(1, n_shapes) / n_shapes)
    shapes = [np.searchsorted(edges, tail, side="right").astype(np.uint8) for tail in tails]
    rng = np.random.default_rng(0)
    samples = []
    for shape in range(n_shapes):
        pooled = np.concatenate([x[:, own == shape].ravel() for x, own in zip(unit, shapes, strict=True)])
        samples.append(rng.choice(pooled, MOST_SAMPLES, replace=False) if pooled.size > MOST_SAMPLES else pooled)
    books = fit_books(samples)
    losses = [
        _distortions(x, own, books) * np.square(scale, dtype=np.float64)[:, None]
        for x, own, scale in zip(unit, shapes, scales, strict=True)
    ]
    widths = allocate_widths(losses, target_bits, weights)
    return tuple(FixedCode(width, scale, own, books) for width, scale, own in zip(widths, scales, shapes, strict=True))


def _distortions(x: Floats32, shapes: NDArray[np.uint8], books: Floats32) -> Floats:
    """``[d, 9]``: mean squared error of each coefficient at each width."""
    errors = np.zeros((x.shape[1], len(WIDTHS)))
    errors[:, 0] = np.square(x, dtype=np.float64).mean(axis=0)
    for shape in np.unique(shapes):
        own = shapes == shape
        for width in WIDTHS[1:]:
            levels = books[shape, _book(width)]
            errors[own, width] = np.square(levels[_indices(x[:, own], levels)] - x[:, own], dtype=np.float64).mean(
                axis=0
            )
    return errors
