"""The format of entropy-coded blocks: constants, tables, the model of a token that chooses among them, encoder.

The contract stands at the head of ``rans_decode.metal``. The encoder here and ``rans_decode`` define both directions
in NumPy; the native path of ``veloxquant_mlx.codes`` and the Metal body compute the same.

Sources: Duda, Asymmetric numeral systems, arXiv 1311.2540; Giesen, Interleaved entropy coders, arXiv 1402.3392.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

LANES: Final = 32
WORD_BITS: Final = 16
STATE_LOW: Final = 1 << WORD_BITS
"""Smallest state of a lane, and its first one in the encoder."""
INACTIVE: Final = 0xFFFF
"""The class of a coefficient that is always zero."""
FIRST_LEVEL: Final = 1 << 13
"""A token's level before its first coefficient; the level says how large its coefficients have been so far."""
LEVEL_DECAY: Final = 5
"""After each coefficient a level loses its ``2**-LEVEL_DECAY``-th part, and gains by the coefficient's magnitude."""
MAX_GAIN: Final = 1024
"""The most that one coefficient adds."""
LEVEL_SHIFT: Final = 7
"""A level without its last bits, at most ``N_LEVELS - 1``, is what contexts are told apart by."""
N_LEVELS: Final = 256
MAX_BLOCK_TOKENS: Final = 256
MAX_SHIFT: Final = 16
MAX_PRECISION: Final = 15
LENGTH_BITS: Final = 6
HEADER_WORDS: Final = 1

Words = NDArray[np.uint16]
Symbols = NDArray[np.int32]


class DamagedBlock(ValueError):
    """Words that no encoder writes: a block of entropy-coded symbols was changed or cut."""


@dataclass(frozen=True)
class Tables:
    """What decoder and encoder share beside the words; shapes and meanings as in ``rans_decode.metal``."""

    classes: NDArray[np.uint16]
    shifts: NDArray[np.uint8]
    cumulative: NDArray[np.uint16]
    class_tables: NDArray[np.uint16]
    weights: NDArray[np.uint16]
    contexts: NDArray[np.uint8]
    precision: int

    @property
    def half(self) -> int:
        """Largest magnitude that has a symbol."""
        return int(self.cumulative.shape[1] - 3) // 2

    @property
    def escape(self) -> int:
        """The last symbol, which a number outside of the alphabet follows."""
        return int(self.cumulative.shape[1]) - 2

    @property
    def active(self) -> NDArray[np.intp]:
        """Coefficients that are coded, in order."""
        return np.flatnonzero(self.classes != INACTIVE)

    def check(self) -> None:
        """Raise unless every value lies within the format.

        Raises:
            ValueError: naming the first that does not.
        """
        if not 1 <= self.precision <= MAX_PRECISION:
            raise ValueError(f"precision must lie in 1..{MAX_PRECISION}, got {self.precision}")
        shape = self.cumulative.shape
        if len(shape) != 2 or shape[1] < 5 or shape[1] % 2 == 0:
            raise ValueError(f"cumulative must be [tables, symbols + 1] with an even n_symbols, got {shape}")
        steps = np.diff(self.cumulative.astype(np.int64), axis=-1)
        if (self.cumulative[..., 0] != 0).any() or (self.cumulative[..., -1] != 1 << self.precision).any():
            raise ValueError(f"cumulative must run from 0 to {1 << self.precision}")
        if (steps < 0).any() or (steps[..., -1] == 0).any():
            raise ValueError("cumulative must ascend, and its last symbol, the escape, must have a frequency")
        if self.class_tables.ndim != 2 or self.class_tables.max() >= shape[0]:
            raise ValueError(f"class_tables must be [classes, contexts] of tables below {shape[0]}")
        n_classes, n_contexts = self.class_tables.shape
        if self.weights.shape != (n_classes,):
            raise ValueError(f"weights must be [{n_classes}], one for each class, got {self.weights.shape}")
        if self.contexts.shape != (N_LEVELS,) or self.contexts.max() >= n_contexts:
            raise ValueError(f"contexts must be [{N_LEVELS}] of contexts below {n_contexts}")
        if self.classes.ndim != 1 or self.classes.shape != self.shifts.shape:
            raise ValueError(f"classes {self.classes.shape} and shifts {self.shifts.shape} must be [n_coefficients]")
        used = self.classes[self.active]
        if used.size and used.max() >= n_classes:
            raise ValueError(f"classes must lie below {n_classes}, got {used.max()}")
        if self.shifts.size and self.shifts.max() > MAX_SHIFT:
            raise ValueError(f"shifts must lie in 0..{MAX_SHIFT}, got {self.shifts.max()}")


@dataclass
class TokenModel:
    """What each token has shown so far: it chooses the next symbol's table. Arrays of any one shape."""

    tables: Tables
    levels: NDArray[np.int64]

    @classmethod
    def start(cls, tables: Tables, shape: tuple[int, ...]) -> TokenModel:
        """Tokens of which nothing is known."""
        return cls(tables, np.full(shape, FIRST_LEVEL, np.int64))

    def cumulative(self, j: int) -> NDArray[np.uint64]:
        """Cumulative frequencies ``[..., n_symbols + 1]`` of coefficient ``j``."""
        tables = self.tables
        context = tables.contexts[np.minimum(self.levels >> LEVEL_SHIFT, N_LEVELS - 1)]
        table = tables.class_tables[tables.classes[j], context]
        chosen: NDArray[np.uint64] = tables.cumulative[table].astype(np.uint64)
        return chosen

    def update(self, j: int, symbols: NDArray[np.int64]) -> None:
        """Coefficient ``j`` was ``symbols``."""
        tables = self.tables
        weighted = np.abs(symbols - tables.half) * int(tables.weights[tables.classes[j]])
        self.levels = self.levels - (self.levels >> LEVEL_DECAY) + np.minimum(weighted, MAX_GAIN)


def block_lanes(n_tokens: int) -> int:
    """Lanes of a block: one for each token, up to 32."""
    return min(n_tokens, LANES)


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
    model.update(j, symbol)
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
