"""Decode blocks of entropy-coded integers; the format stands at the head of ``rans_decode.metal``.

The reference is NumPy, vectorised over blocks and lanes: integers of 32 and 64 bits, nothing else, so it has the same
bits wherever it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.kernel import Backend, Kernel, no_rows, resolve_backend
from veloxquant_kernels.rans_format import (
    HEADER_WORDS,
    LANES,
    LENGTH_BITS,
    STATE_LOW,
    WORD_BITS,
    Symbols,
    Tables,
    TokenModel,
    Words,
    block_lanes,
    check_layout,
)

_KERNEL = Kernel(
    "rans_decode",
    ("words", "starts", "first_tokens", "classes", "shifts", "cumulative", "class_tables", "weights", "contexts"),
    ("symbols", "status"),
    ("rans",),
)


@dataclass
class _Lanes:
    """The lanes of several blocks of equal length, ``[n_blocks, n_lanes]``."""

    words: Words
    states: NDArray[np.uint64]
    at: NDArray[np.int64]
    end: NDArray[np.int64]
    damaged: NDArray[np.bool_]

    def refill(self, active: NDArray[np.bool_]) -> None:
        wants = active & (self.states < STATE_LOW)
        position = self.at[:, None] + np.cumsum(wants, axis=1) - wants
        there = wants & (position < self.end[:, None])
        self.damaged |= (wants & ~there).any(axis=1)
        word = self.words[np.where(there, position, 0)].astype(np.uint64)
        self.states = np.where(there, (self.states << np.uint64(WORD_BITS)) | word, self.states)
        self.at += wants.sum(axis=1)

    def bits(self, active: NDArray[np.bool_], width: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
        widths = np.broadcast_to(np.asarray(width, np.uint64), self.states.shape)
        value = self.states & ((np.uint64(1) << widths) - np.uint64(1))
        self.states = np.where(active, self.states >> widths, self.states)
        self.refill(active)
        return value

    def symbol(self, active: NDArray[np.bool_], cumulative: NDArray[np.uint64], precision: int) -> NDArray[np.int64]:
        slot = self.states & np.uint64((1 << precision) - 1)
        symbol: NDArray[np.int64] = (cumulative <= slot[..., None]).sum(axis=-1) - 1
        start, stop = (np.take_along_axis(cumulative, (symbol + i)[..., None], -1)[..., 0] for i in (0, 1))
        decoded = (stop - start) * (self.states >> np.uint64(precision)) + slot - start
        self.states = np.where(active, decoded, self.states)
        self.refill(active)
        return symbol

    def number(self, active: NDArray[np.bool_]) -> NDArray[np.uint64]:
        one = np.uint64(1)
        length = self.bits(active, LENGTH_BITS)
        self.damaged |= (active & (length > 32)).any(axis=1)
        length = np.minimum(length, np.uint64(32))
        rest = np.maximum(length, one) - one
        low_width = np.minimum(rest, np.uint64(WORD_BITS))
        low = self.bits(active, low_width)
        high = self.bits(active, rest - low_width)
        return np.where(length > 0, (one << rest) | (high << np.uint64(WORD_BITS)) | low, np.uint64(0))


def unzigzag(number: NDArray[np.uint64]) -> NDArray[np.int64]:
    """0, 1, 2, 3, ... as 0, -1, 1, -2, ..."""
    return (number >> np.uint64(1)).astype(np.int64) ^ -(number & np.uint64(1)).astype(np.int64)


def _decode_equal(
    words: Words, starts: NDArray[np.int64], ends: NDArray[np.int64], n_tokens: int, tables: Tables
) -> tuple[Symbols, NDArray[np.bool_]]:
    """Blocks of ``n_tokens`` each: symbols ``[n_coefficients, n_blocks, n_tokens]`` and which blocks are damaged."""
    n_blocks, n_lanes = len(starts), block_lanes(n_tokens)
    symbols = np.zeros((len(tables.classes), n_blocks, n_tokens), np.int32)
    payload = starts + HEADER_WORDS + 2 * n_lanes
    short = ends < payload
    safe = np.where(short, 0, starts)
    padded = np.concatenate([words, np.zeros(HEADER_WORDS + 2 * LANES, np.uint16)])
    halves = padded[safe[:, None] + HEADER_WORDS + np.arange(2 * n_lanes)].astype(np.uint64)
    lanes = _Lanes(
        words=padded,
        states=halves[:, ::2] | (halves[:, 1::2] << np.uint64(WORD_BITS)),
        at=payload.copy(),
        end=ends,
        damaged=short | (padded[safe].astype(np.int64) + 1 != n_tokens),
    )
    groups = -(-n_tokens // LANES)
    lanes.damaged |= (lanes.states < STATE_LOW).any(axis=1)
    for group in range(groups):
        n_here = min(LANES, n_tokens - LANES * group)
        active = np.broadcast_to(np.arange(n_lanes) < n_here, (n_blocks, n_lanes))
        model = TokenModel.start(tables, (n_blocks, n_lanes))
        for j in tables.active:
            symbol = lanes.symbol(active, model.cumulative(j), tables.precision)
            escapes, shift = active & (symbol == tables.escape), int(tables.shifts[j])
            value = symbol - tables.half
            if shift:
                value = (value << shift) | lanes.bits(active & ~escapes, shift).astype(np.int64)
            if escapes.any():
                value = np.where(escapes, unzigzag(lanes.number(escapes)), value)
            model.update(j, symbol)
            symbols[j, :, LANES * group : LANES * group + n_here] = value[:, :n_here].astype(np.int32)
    lanes.damaged |= (lanes.states != STATE_LOW).any(axis=1) | (lanes.at != lanes.end)
    return symbols, lanes.damaged


def rans_decode_reference(
    words: Words, starts: NDArray[np.int64], first_tokens: NDArray[np.int64], tables: Tables
) -> tuple[Symbols, NDArray[np.uint32]]:
    """The definition, on NumPy arrays shaped as in ``rans_decode.metal``: symbols and status."""
    lengths = np.diff(first_tokens)
    symbols = np.zeros((len(tables.classes), int(first_tokens[-1])), np.int32)
    status = np.zeros(len(lengths), np.uint32)
    for n_tokens in np.unique(lengths):
        blocks = np.flatnonzero(lengths == n_tokens)
        decoded, damaged = _decode_equal(words, starts[blocks], starts[blocks + 1], int(n_tokens), tables)
        symbols[:, first_tokens[blocks][:, None] + np.arange(n_tokens)] = decoded
        status[blocks] = damaged
    return symbols, status


def rans_decode(
    words: mx.array,
    starts: mx.array,
    first_tokens: mx.array,
    tables: Tables,
    *,
    backend: Backend | None = None,
) -> tuple[mx.array, mx.array]:
    """Decode blocks of integers that ``veloxquant_mlx.codes.entropy.encode_blocks`` wrote.

    Args:
        words: ``[n_words]`` uint16, the blocks' records.
        starts: ``[n_blocks + 1]`` uint32, where each record begins, and where the last ends.
        first_tokens: ``[n_blocks + 1]`` uint32, the first token of each block, and the number of all.
        tables: as for the encoder.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[n_coefficients, n_tokens]`` int32, and ``[n_blocks]`` uint32: 0 for an intact block, 1 for a damaged one,
        whose symbols mean nothing.

    Raises:
        ValueError: tables outside of the format.
        DamagedBlock: records that do not lie one after another within the words.
        TypeError: an array of another dtype.
    """
    arrays = {"words": words, "starts": starts, "first_tokens": first_tokens}
    for (name, array), dtype in zip(arrays.items(), (mx.uint16, mx.uint32, mx.uint32), strict=True):
        if (problem := no_rows(name, array)) is not None:
            raise ValueError(problem)
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
    tables.check()
    begins, tokens = (np.array(array).astype(np.int64) for array in (starts, first_tokens))
    check_layout(begins, tokens, words.size)
    backend = resolve_backend(backend)
    if backend == "reference":
        symbols, status = rans_decode_reference(np.array(words), begins, tokens, tables)
        return mx.array(symbols), mx.array(status)
    names = ("classes", "shifts", "cumulative", "class_tables", "weights", "contexts")
    decoded, state = _KERNEL(
        [words, starts, first_tokens, *(mx.array(getattr(tables, name)) for name in names)],
        backend=backend,
        template=[("PRECISION", tables.precision)],
        grid=(LANES * (starts.size - 1), 1, 1),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(tables.classes.size, int(tokens[-1])), (starts.size - 1,)],
        output_dtypes=[mx.int32, mx.uint32],
    )
    return decoded, state
