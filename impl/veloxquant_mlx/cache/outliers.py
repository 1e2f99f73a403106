"""Tokens that are kept a second time, at a larger width, because an observer flagged them."""

from __future__ import annotations

from fractions import Fraction

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_mlx.cache.storage import CodedBlocks, HeldArray, OnEncoded, State, appended, check_array
from veloxquant_mlx.quantizers.base import Quantizer


class OutlierTokens:
    """Flagged tokens of one layer: position, keys and values, in order of arrival.

    A flagged token also lies among the others at their width; what it decodes to there is replaced, on fetch and where
    a trim returns it to the fp16 tail. Both copies are counted. Tokens in the fp16 sinks or window stay as they are.

    Args:
        keys: per-token quantizer of flagged keys.
        values: likewise of values.
        on_encoded: are told of every token that is kept, of its key and of its value.
    """

    def __init__(
        self,
        keys: Quantizer,
        values: Quantizer,
        on_encoded: tuple[OnEncoded | None, OnEncoded | None] = (None, None),
    ) -> None:
        self.keys = CodedBlocks(keys)
        self.values = CodedBlocks(values)
        self.on_encoded = on_encoded
        self.positions: mx.array | None = None

    @property
    def count(self) -> int:
        """Flagged tokens held."""
        return self.keys.blocks

    def _held_positions(self) -> NDArray[np.int32]:
        if self.positions is None:
            return np.zeros((0, 2), dtype=np.int32)
        return np.array(self.positions[0, 0, : self.count])

    def add(self, flags: NDArray[np.bool_], offset: int, keys: mx.array, values: mx.array) -> None:
        """Keep the flagged tokens of a chunk.

        Args:
            flags: ``[B, T]``.
            offset: position of the chunk's first token.
            keys: ``[B, H, T, D]``.
            values: ``[B, H, T, D]``.
        """
        flagged = np.argwhere(flags.T)[:, ::-1].astype(np.int32)  # by time, then by sequence
        if not len(flagged):
            return
        rows, tokens = mx.array(flagged[:, 0]), mx.array(flagged[:, 1])
        positions = flagged + np.array([0, offset], dtype=np.int32)
        self.positions = appended(self.positions, mx.array(positions)[None, None], self.count, self.keys.step)
        for side, x, on_encoded in zip((self.keys, self.values), (keys, values), self.on_encoded, strict=True):
            flat = x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1, x.shape[3])
            side.append(mx.take(flat, rows * x.shape[2] + tokens, axis=1)[None], on_encoded)

    def overlay(self, decoded: mx.array, kept: CodedBlocks, first: int, start: int, stop: int) -> mx.array:
        """Replace flagged tokens in what a side decoded.

        Args:
            decoded: ``[B, H, T, D]``.
            kept: the flagged tokens of that side.
            first: position of the first token of ``decoded``.
            start: index of the first one that was coded.
            stop: index of the first one behind it that was not.
        """
        positions = self._held_positions()
        local = positions[:, 1] - first
        hit = np.flatnonzero((local >= max(start, 0)) & (local < stop))
        if not len(hit):
            return decoded
        flagged = mx.take(kept.decode(decoded.dtype)[0], mx.array(hit), axis=1)
        rows, tokens = mx.array(positions[hit, 0]), mx.array(local[hit].astype(np.int32))
        decoded[rows, :, tokens] = flagged.transpose(1, 0, 2)
        return decoded

    def truncate(self, offset: int) -> None:
        """Forget tokens at ``offset`` and behind."""
        left = int(np.sum(self._held_positions()[:, 1] < offset))
        self.keys.truncate(left)
        self.values.truncate(left)

    def drop_before(self, position: int) -> None:
        """Forget tokens before ``position``."""
        gone = int(np.sum(self._held_positions()[:, 1] < position))
        if gone and self.positions is not None:
            self.positions = mx.contiguous(self.positions[:, :, gone : self.count]) if gone < self.count else None
            self.keys.drop_front(gone)
            self.values.drop_front(gone)

    def rows(self, index: slice) -> None:
        """Keep only some sequences of the batch."""
        positions = self._held_positions()
        if not len(positions):
            return
        wanted = list(range(int(positions[:, 0].max()) + 1))[index]
        keep = np.flatnonzero(np.isin(positions[:, 0], wanted))
        kept = positions[keep] - np.array([wanted[0] if wanted else 0, 0], dtype=np.int32)
        self.positions = mx.array(kept)[None, None] if len(keep) else None
        for side in (self.keys, self.values):
            side.arrays = tuple(mx.take(array, mx.array(keep), axis=2) for array in side.arrays) if len(keep) else ()
            side.blocks = len(keep)

    def held_arrays(self) -> list[HeldArray]:
        """Positions and codes."""
        if self.positions is None:
            return []
        held = [HeldArray("outliers.positions", self.positions, self.count, self.positions.shape[2])]
        return held + self.keys.held_arrays("outliers.keys") + self.values.held_arrays("outliers.values")

    def formula_bytes(self, n_heads: int) -> Fraction:
        """Bytes in use: 8 per token for its position, and its codes in all heads."""
        return Fraction(self.count * 8) + n_heads * (self.keys.formula_bits() + self.values.formula_bits()) / 8

    def static_arrays(self) -> list[mx.array]:
        """The quantizers' tables."""
        return self.keys.static_arrays() + self.values.static_arrays()

    def check(self, name: str, shape: tuple[int, int, int] | None, offset: int) -> None:
        """Raise ValueError unless a loaded state's tokens are those of ``offset`` tokens of ``shape`` (B, H, D)."""
        if self.keys.blocks != self.values.blocks:
            raise ValueError(f"{name}: {self.keys.blocks} keys and {self.values.blocks} values")
        if not self.count or shape is None:
            return
        check_array(f"{name}: positions", self.positions, (1, 1, None, 2), mx.int32, self.count)
        rows, tokens = self._held_positions().T
        if rows.min() < 0 or rows.max() >= shape[0] or tokens.min() < 0 or tokens.max() >= offset:
            raise ValueError(f"{name}: positions must lie within {shape[0]} sequences of {offset} tokens")
        for side, role in ((self.keys, "keys"), (self.values, "values")):
            side.check(f"{name}: {role}", 1, shape[1], side.head_dim)

    def state(self) -> State:
        """Keys, values, positions."""
        keys = self.keys.state()
        return [*keys, *self.values.state(), self.positions, len(keys)]

    def load_state(self, state: State) -> None:
        """Take what :meth:`state` gave."""
        *both, self.positions, n_keys = state
        self.keys.load_state(both[:n_keys])
        self.values.load_state(both[n_keys:])
