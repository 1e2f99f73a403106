"""Encode integers in blocks, in NumPy: the definition of what ``rans_decode`` reads back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.rans_format import (
    LANES,
    LENGTH_BITS,
    STATE_LOW,
    WORD_BITS,
    Symbols,
    Tables,
    TokenModel,
    Words,
    block_lanes,
)


@dataclass
class Part:
    """One part of a step, for all lanes: numbers of ``width`` bits, or symbols where ``frequency`` is given."""

    active: NDArray[np.bool_]
    value: NDArray[np.uint64]
    width: NDArray[np.uint64]
    frequency: NDArray[np.uint64]

    def push(self, states: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The lanes' states with it on top."""
        quotient, rest = states // self.frequency, states % self.frequency
        return np.where(self.active, (quotient << self.width) + rest + self.value, states)

    def full(self, states: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Lanes that give a word away first, so that their states stay below 2**32."""
        return self.active & (states >= self.frequency << (np.uint64(32) - self.width))


def _bits(active: NDArray[np.bool_], value: NDArray[np.uint64], width: NDArray[np.uint64]) -> Part:
    return Part(active, value & ((np.uint64(1) << width) - np.uint64(1)), width, np.ones_like(value))


def step_parts(
    tables: Tables, model: TokenModel, j: int, values: NDArray[np.int64], active: NDArray[np.bool_]
) -> list[Part]:
    """The parts of one step in decoding order; the model moves on."""
    cumulative, shift = model.cumulative(j), int(tables.shifts[j])
    near = values >> shift
    inside = np.abs(near) <= tables.half
    symbol = np.where(inside, np.clip(near, -tables.half, tables.half) + tables.half, tables.escape)

    def bounds(symbol: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        low, high = (np.take_along_axis(cumulative, (symbol + i)[..., None], -1)[..., 0] for i in (0, 1))
        return low, high - low

    symbol = np.where(bounds(symbol)[1] == 0, tables.escape, symbol)
    start, frequency = bounds(symbol)
    escapes = active & (symbol == tables.escape)
    precision = np.full(start.shape, tables.precision, np.uint64)
    parts = [Part(active, start, precision, np.maximum(frequency, np.uint64(1)))]
    if shift:
        parts.append(_bits(active & ~escapes, values.astype(np.uint64), np.full(start.shape, shift, np.uint64)))
    if escapes.any():
        number = ((values << 1) ^ (values >> 63)).astype(np.uint64)
        length = np.frexp(number.astype(np.float64))[1].astype(np.int64)
        rest = np.maximum(length - 1, 0).astype(np.uint64)
        low = np.minimum(rest, np.uint64(WORD_BITS))
        parts.append(_bits(escapes, length.astype(np.uint64), np.full(start.shape, LENGTH_BITS, np.uint64)))
        parts.append(_bits(escapes, number, low))
        parts.append(_bits(escapes, number >> np.uint64(WORD_BITS), rest - low))
    model.update(j, symbol, values)
    return parts


def _encode_equal(symbols: Symbols, tables: Tables) -> list[Words]:
    """Records of blocks of equal length, ``[n_blocks, n_tokens, d]``."""
    n_blocks, n_tokens, _ = symbols.shape
    n_lanes, groups = block_lanes(n_tokens), -(-n_tokens // LANES)
    steps: list[list[Part]] = []
    for group in range(groups):
        here = symbols[:, LANES * group : LANES * (group + 1)].astype(np.int64)
        values = np.zeros((n_blocks, n_lanes, symbols.shape[2]), np.int64)
        values[:, : here.shape[1]] = here
        active = np.broadcast_to(np.arange(n_lanes) < here.shape[1], (n_blocks, n_lanes))
        model = TokenModel.start(tables, (n_blocks, n_lanes))
        steps += [step_parts(tables, model, int(j), values[..., j], active) for j in tables.active]
    states = np.full((n_blocks, n_lanes), STATE_LOW, np.uint64)
    given: list[tuple[NDArray[np.bool_], NDArray[np.uint64]]] = []
    for part in (part for step in reversed(steps) for part in reversed(step)):
        out = part.full(states)
        given.append((out, states & np.uint64(STATE_LOW - 1)))
        states = part.push(np.where(out, states >> np.uint64(WORD_BITS), states))
    flags = np.array([out for out, _ in reversed(given)], np.bool_).reshape(-1, n_blocks, n_lanes)
    words = np.array([word for _, word in reversed(given)], np.uint16).reshape(-1, n_blocks, n_lanes)
    halves = np.stack([states & np.uint64(STATE_LOW - 1), states >> np.uint64(WORD_BITS)], -1)
    return [
        np.concatenate([[n_tokens - 1], halves[b].ravel(), words[:, b][flags[:, b]]]).astype(np.uint16)
        for b in range(n_blocks)
    ]


def rans_encode_reference(symbols: Symbols, tables: Tables, block_tokens: int) -> list[Words]:
    """Records of ``ceil(T / block_tokens)`` blocks of tokens.

    Args:
        symbols: ``[T, n_coefficients]`` int32; zero where the tables code nothing.
        tables: as for the decoder.
        block_tokens: tokens in a block, 1..256; the last block may be shorter.
    """
    n_full = len(symbols) // block_tokens
    full = symbols[: n_full * block_tokens].reshape(n_full, block_tokens, symbols.shape[1])
    records = _encode_equal(full, tables) if n_full else []
    if n_full * block_tokens < len(symbols):
        records += _encode_equal(symbols[None, n_full * block_tokens :], tables)
    return records
