"""The format of entropy-coded blocks: its constants, its tables, and the model of a token that chooses among them.

The contract stands at the head of ``rans_decode.metal``. ``rans_encode`` and ``rans_decode`` define both directions in
NumPy; the native path of ``veloxquant_mlx.codes`` and the Metal body compute the same.

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
LEVEL_DECAY: Final = 5
MAX_GAIN: Final = 1024
LEVEL_SHIFT: Final = 7
N_LEVELS: Final = 256
MAX_BLOCK_TOKENS: Final = 256
MAX_SHIFT: Final = 16
MAX_PRECISION: Final = 15
LENGTH_BITS: Final = 6
HEADER_WORDS: Final = 1

NEXT_STATES: Final[dict[int, tuple[tuple[int, int], ...]]] = {
    1: ((0, 0),),
    4: ((0, 1), (2, 3), (1, 0), (3, 2)),
    8: ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)),
}
"""By number of trellis states: what follows each state after an even and after an odd symbol."""

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
    n_states: int

    @property
    def half(self) -> int:
        """Largest magnitude that has a symbol."""
        return int(self.cumulative.shape[2] - 3) // 2

    @property
    def escape(self) -> int:
        """The last symbol, which a number outside of the alphabet follows."""
        return int(self.cumulative.shape[2]) - 2

    @property
    def active(self) -> NDArray[np.intp]:
        """Coefficients that are coded, in order."""
        return np.flatnonzero(self.classes != INACTIVE)

    def check(self) -> None:
        """Raise unless every value lies within the format.

        Raises:
            ValueError: naming the first that does not.
        """
        if self.n_states not in NEXT_STATES:
            raise ValueError(f"n_states must be one of {sorted(NEXT_STATES)}, got {self.n_states}")
        if not 1 <= self.precision <= MAX_PRECISION:
            raise ValueError(f"precision must lie in 1..{MAX_PRECISION}, got {self.precision}")
        sets, shape = 1 + (self.n_states > 1), self.cumulative.shape
        if len(shape) != 3 or shape[0] != sets or shape[2] < 5 or shape[2] % 2 == 0:
            raise ValueError(f"cumulative must be [{sets}, tables, symbols + 1] with an even n_symbols, got {shape}")
        steps = np.diff(self.cumulative.astype(np.int64), axis=-1)
        if (self.cumulative[..., 0] != 0).any() or (self.cumulative[..., -1] != 1 << self.precision).any():
            raise ValueError(f"cumulative must run from 0 to {1 << self.precision}")
        if (steps < 0).any() or (steps[..., -1] == 0).any():
            raise ValueError("cumulative must ascend, and its last symbol, the escape, must have a frequency")
        if self.class_tables.ndim != 2 or self.class_tables.max() >= shape[1]:
            raise ValueError(f"class_tables must be [classes, contexts] of tables below {shape[1]}")
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
    states: NDArray[np.int64]

    @classmethod
    def start(cls, tables: Tables, shape: tuple[int, ...]) -> TokenModel:
        """Tokens of which nothing is known."""
        return cls(tables, np.full(shape, FIRST_LEVEL, np.int64), np.zeros(shape, np.int64))

    def cumulative(self, j: int) -> NDArray[np.uint64]:
        """Cumulative frequencies ``[..., n_symbols + 1]`` of coefficient ``j``."""
        tables = self.tables
        context = tables.contexts[np.minimum(self.levels >> LEVEL_SHIFT, N_LEVELS - 1)]
        table = tables.class_tables[tables.classes[j], context]
        sets = self.states & 1 if tables.n_states > 1 else 0
        chosen: NDArray[np.uint64] = tables.cumulative[sets, table].astype(np.uint64)
        return chosen

    def update(self, j: int, symbols: NDArray[np.int64], values: NDArray[np.int64]) -> None:
        """Coefficient ``j`` was ``symbols``, which made ``values``."""
        tables = self.tables
        weighted = np.abs(symbols - tables.half) * int(tables.weights[tables.classes[j]])
        self.levels = self.levels - (self.levels >> LEVEL_DECAY) + np.minimum(weighted, MAX_GAIN)
        if tables.n_states > 1:
            self.states = np.array(NEXT_STATES[tables.n_states])[self.states, values & 1]


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
