"""Decode blocks of entropy-coded integers; the format stands at the head of ``rans_decode.metal``.

The reference is NumPy, vectorised over blocks and lanes: integers of 32 and 64 bits, nothing else, so it has the same
bits wherever it runs. It defines what the Metal body and the native C++ decoder of ``veloxquant_mlx.codes`` compute.

Sources: Duda, Asymmetric numeral systems, arXiv 1311.2540; Giesen, Interleaved entropy coders, arXiv 1402.3392.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.kernel import Backend, Kernel, check_not_empty, resolve_backend

LANES: Final = 32
WORD_BITS: Final = 16
STATE_LOW: Final = 1 << WORD_BITS
"""Smallest state of a lane outside of a block's tail."""
INACTIVE: Final = 0xFFFF
"""The row of a coefficient that is always zero."""
MAX_BLOCK_TOKENS: Final = 256
MAX_SHIFT: Final = 16
MAX_PRECISION: Final = 15
LENGTH_BITS: Final = 6
HEADER_WORDS: Final = 2

NEXT_STATES: Final[dict[int, tuple[tuple[int, int], ...]]] = {
    1: ((0, 0),),
    4: ((0, 1), (2, 3), (1, 0), (3, 2)),
    8: ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)),
}
"""By number of trellis states: what follows each state after an even and after an odd symbol."""

Words = NDArray[np.uint16]
Symbols = NDArray[np.int32]

_KERNEL = Kernel(
    "rans_decode",
    ("words", "starts", "first_tokens", "rows", "shifts", "cumulative"),
    ("symbols", "status"),
    ("rans",),
)


class DamagedBlock(ValueError):
    """Words that no encoder writes: a block of entropy-coded symbols was changed or cut."""


def block_lanes(n_tokens: int) -> int:
    """Lanes of a block: one for each token, up to 32."""
    return min(n_tokens, LANES)


@dataclass
class _Lanes:
    """The lanes of several blocks of equal length, ``[n_blocks, n_lanes]``."""

    words: Words
    states: NDArray[np.uint64]
    at: NDArray[np.int64]
    end: NDArray[np.int64]
    refills: NDArray[np.bool_]
    damaged: NDArray[np.bool_]

    def refill(self, active: NDArray[np.bool_]) -> None:
        wants = active & self.refills[:, None] & (self.states < STATE_LOW)
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
        """``cumulative``: one row for all lanes ``[A + 1]``, or a row for each ``[n_blocks, n_lanes, A + 1]``."""
        slot = self.states & np.uint64((1 << precision) - 1)
        if cumulative.ndim == 1:
            symbol = np.searchsorted(cumulative, slot, side="right") - 1
            start, stop = cumulative[symbol], cumulative[symbol + 1]
        else:
            symbol = (cumulative <= slot[..., None]).sum(axis=-1) - 1
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
    words: Words,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    n_tokens: int,
    rows: NDArray[np.uint16],
    shifts: NDArray[np.uint8],
    cumulative: NDArray[np.uint16],
    precision: int,
    n_states: int,
) -> tuple[Symbols, NDArray[np.bool_]]:
    """Blocks of ``n_tokens`` each: symbols ``[n_coefficients, n_blocks, n_tokens]`` and which blocks are damaged."""
    n_blocks, n_lanes = len(starts), block_lanes(n_tokens)
    symbols = np.zeros((len(rows), n_blocks, n_tokens), np.int32)
    payload = starts + HEADER_WORDS + 2 * n_lanes
    short = ends < payload
    safe = np.where(short, 0, starts)
    padded = np.concatenate([words, np.zeros(HEADER_WORDS + 2 * LANES, np.uint16)])
    n_tail = padded[safe + 1].astype(np.int64)
    halves = padded[safe[:, None] + HEADER_WORDS + np.arange(2 * n_lanes)].astype(np.uint64)
    lanes = _Lanes(
        words=padded,
        states=halves[:, ::2] | (halves[:, 1::2] << np.uint64(WORD_BITS)),
        at=payload.copy(),
        end=ends,
        refills=np.ones(n_blocks, np.bool_),
        damaged=short | (padded[safe].astype(np.int64) + 1 != n_tokens),
    )
    groups = -(-n_tokens // LANES)
    active_rows = np.flatnonzero(rows != INACTIVE)
    steps_left = groups * len(active_rows)
    lanes.damaged |= (lanes.states < STATE_LOW).any(axis=1) | (n_tail > steps_left)
    tables, next_states = cumulative.astype(np.uint64), np.array(NEXT_STATES[n_states])
    half = (cumulative.shape[2] - 3) // 2
    escape = cumulative.shape[2] - 2

    def end_refills(now: NDArray[np.bool_]) -> None:
        lanes.states = np.where(now[:, None], (lanes.states - np.uint64(STATE_LOW)) & np.uint64(0xFFFFFFFF), lanes.states)
        lanes.refills &= ~now

    for group in range(groups):
        n_here = min(LANES, n_tokens - LANES * group)
        active = np.broadcast_to(np.arange(n_lanes) < n_here, (n_blocks, n_lanes))
        trellis = np.zeros((n_blocks, n_lanes), np.int64)
        for j in active_rows:
            end_refills(lanes.refills & (steps_left <= n_tail))
            steps_left -= 1
            table = tables[trellis & 1, rows[j]] if n_states > 1 else tables[0, rows[j]]
            symbol = lanes.symbol(active, table, precision)
            escapes = active & (symbol == escape)
            value = symbol - half
            if shifts[j]:
                low = lanes.bits(active & ~escapes, int(shifts[j]))
                value = (value << int(shifts[j])) | low.astype(np.int64)
            if escapes.any():
                value = np.where(escapes, unzigzag(lanes.number(escapes)), value)
            if n_states > 1:
                trellis = next_states[trellis, value & 1]
            symbols[j, :, LANES * group : LANES * group + n_here] = value[:, :n_here].astype(np.int32)
    end_refills(lanes.refills)
    lanes.damaged |= (lanes.states != 0).any(axis=1) | (lanes.at != lanes.end)
    return symbols, lanes.damaged


def rans_decode_reference(
    words: Words,
    starts: NDArray[np.int64],
    first_tokens: NDArray[np.int64],
    rows: NDArray[np.uint16],
    shifts: NDArray[np.uint8],
    cumulative: NDArray[np.uint16],
    precision: int,
    n_states: int,
) -> tuple[Symbols, NDArray[np.uint32]]:
    """The definition, on NumPy arrays shaped as in ``rans_decode.metal``: symbols and status."""
    lengths = np.diff(first_tokens)
    symbols = np.zeros((len(rows), int(first_tokens[-1])), np.int32)
    status = np.zeros(len(lengths), np.uint32)
    for n_tokens in np.unique(lengths):
        blocks = np.flatnonzero(lengths == n_tokens)
        decoded, damaged = _decode_equal(
            words, starts[blocks], starts[blocks + 1], int(n_tokens), rows, shifts, cumulative, precision, n_states
        )
        symbols[:, first_tokens[blocks][:, None] + np.arange(n_tokens)] = decoded
        status[blocks] = damaged
    return symbols, status


def check_layout(starts: NDArray[np.int64], first_tokens: NDArray[np.int64], n_words: int) -> None:
    """Raise unless the blocks lie one after another within ``n_words`` and hold 1 to 256 tokens each.

    Raises:
        DamagedBlock: naming what does not fit.
    """
    if starts.ndim != 1 or starts.shape != first_tokens.shape or starts.size < 2:
        raise DamagedBlock(f"starts {starts.shape} and first_tokens {first_tokens.shape} must be vectors of one length")
    if starts[0] < 0 or (np.diff(starts) < 0).any() or starts[-1] > n_words:
        raise DamagedBlock(f"starts must ascend within the {n_words} words")
    lengths = np.diff(first_tokens)
    if first_tokens[0] != 0 or lengths.min() < 1 or lengths.max() > MAX_BLOCK_TOKENS:
        raise DamagedBlock(f"a block must hold 1..{MAX_BLOCK_TOKENS} tokens")


def rans_decode(
    words: mx.array,
    starts: mx.array,
    first_tokens: mx.array,
    rows: mx.array,
    shifts: mx.array,
    cumulative: mx.array,
    *,
    precision: int,
    n_states: int = 1,
    backend: Backend | None = None,
) -> tuple[mx.array, mx.array]:
    """Decode blocks of integers that ``veloxquant_mlx.codes.entropy.encode_blocks`` wrote.

    Args:
        words: ``[n_words]`` uint16, the blocks' records.
        starts: ``[n_blocks + 1]`` uint32, where each record begins, and where the last ends.
        first_tokens: ``[n_blocks + 1]`` uint32, the first token of each block, and the number of all.
        rows: ``[n_coefficients]`` uint16, each coefficient's table, or ``INACTIVE``.
        shifts: ``[n_coefficients]`` uint8, plain low bits of each coefficient's symbols.
        cumulative: ``[n_sets, n_rows, n_symbols + 1]`` uint16, cumulative frequencies.
        precision: the frequencies of a row sum to ``2**precision``.
        n_states: states of the trellis, 1 (none), 4 or 8.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[n_coefficients, n_tokens]`` int32, and ``[n_blocks]`` uint32: 0 for an intact block, 1 for a damaged one,
        whose symbols mean nothing.

    Raises:
        ValueError: a precision, a number of states, a row or a shape outside of the format.
        TypeError: an array of another dtype.
    """
    dtypes = (mx.uint16, mx.uint32, mx.uint32, mx.uint16, mx.uint8, mx.uint16)
    names = ("words", "starts", "first_tokens", "rows", "shifts", "cumulative")
    arrays = (words, starts, first_tokens, rows, shifts, cumulative)
    for name, array, dtype in zip(names, arrays, dtypes, strict=True):
        check_not_empty(name, array)
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
    if n_states not in NEXT_STATES:
        raise ValueError(f"n_states must be one of {sorted(NEXT_STATES)}, got {n_states}")
    if not 1 <= precision <= MAX_PRECISION:
        raise ValueError(f"precision must lie in 1..{MAX_PRECISION}, got {precision}")
    if cumulative.ndim != 3 or cumulative.shape[0] != 1 + (n_states > 1) or cumulative.shape[2] < 4:
        raise ValueError(f"cumulative must be [{1 + (n_states > 1)}, rows, symbols + 1], got {cumulative.shape}")
    as_numpy = [np.array(array) for array in arrays]
    check_layout(as_numpy[1].astype(np.int64), as_numpy[2].astype(np.int64), words.size)
    used = as_numpy[3][as_numpy[3] != INACTIVE]
    if rows.shape != shifts.shape or (used.size and used.max() >= cumulative.shape[1]):
        raise ValueError(f"rows and shifts must be [n_coefficients] and name one of {cumulative.shape[1]} tables")
    if as_numpy[4].max() > MAX_SHIFT:
        raise ValueError(f"shifts must lie in 0..{MAX_SHIFT}, got {as_numpy[4].max()}")
    backend = resolve_backend(backend)
    n_blocks, n_tokens = starts.size - 1, int(as_numpy[2][-1])
    if backend == "reference":
        symbols, status = rans_decode_reference(
            as_numpy[0], as_numpy[1].astype(np.int64), as_numpy[2].astype(np.int64), *as_numpy[3:], precision, n_states
        )
        return mx.array(symbols), mx.array(status)
    decoded, state = _KERNEL(
        list(arrays),
        backend=backend,
        template=[("PRECISION", precision), ("N_STATES", n_states)],
        grid=(LANES * n_blocks, 1, 1),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(rows.size, n_tokens), (n_blocks,)],
        output_dtypes=[mx.int32, mx.uint32],
    )
    return decoded, state
