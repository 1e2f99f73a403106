"""Growing packed storage of one side (keys or values) of one layer.

Tokens lie in time order as ``[sinks | coded blocks | tail]``: the first ``sinks`` tokens and the last ``window``
ones in fp16, all between as packed codes. The tail also holds tokens that do not fill a block yet. Buffers grow
by at least ``STEP`` tokens and by an eighth of their size, so that appending T tokens copies O(T) bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from veloxquant_mlx.quantizers.base import Codes, Quantizer

STEP: Final = 256
"""Tokens by which a buffer grows at least."""


@dataclass(frozen=True)
class HeldArray:
    """One array that a cache keeps for tokens, with how much of its token axis is in use."""

    name: str
    array: mx.array
    used_slots: int
    slots: int


def grown_slots(needed: int, used: int, step: int) -> int:
    """Slots to allocate for ``needed`` when ``used`` are held: whole steps, an eighth ahead when growing."""
    wanted = max(needed, used + used // 8)
    return -(-wanted // step) * step


class CodedBlocks:
    """Packed blocks of tokens in growing buffers ``[B, H, slots, width]``, oldest first."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.arrays: tuple[mx.array, ...] = ()
        self.head_dim = 0
        self.blocks = 0

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.blocks * self.quantizer.block_tokens

    @property
    def slots(self) -> int:
        """Blocks that fit in what is allocated."""
        return self.arrays[0].shape[2] if self.arrays else 0

    def append(self, x: mx.array) -> None:
        """Encode ``[B, H, T, D]`` (whole blocks) behind what is held."""
        codes = self.quantizer.encode(x)
        self.head_dim = codes.head_dim
        added = x.shape[2] // self.quantizer.block_tokens
        total = self.blocks + added
        if total > self.slots:
            self._grow(codes, total)
        for buffer, new in zip(self.arrays, codes.arrays, strict=True):
            buffer[:, :, self.blocks : total] = new
        self.blocks = total

    def _grow(self, like: Codes, total: int) -> None:
        step = max(1, STEP // self.quantizer.block_tokens)
        slots = grown_slots(total, self.blocks, step)
        grown = []
        for i, new in enumerate(like.arrays):
            n_batch, n_heads, _, width = new.shape
            room = mx.zeros((n_batch, n_heads, slots - self.blocks, width), dtype=new.dtype)
            held = [self.arrays[i][:, :, : self.blocks]] if self.blocks else []
            grown.append(mx.concatenate([*held, room], axis=2))
        self.arrays = tuple(grown)

    def decode(self, dtype: mx.Dtype, first: int = 0, last: int | None = None) -> mx.array:
        """Decode blocks ``first`` up to ``last`` (all held by default) to ``[B, H, T, D]``."""
        last = self.blocks if last is None else last
        return self.quantizer.decode(Codes(self.arrays, self.head_dim).map(lambda a: a[:, :, first:last]), dtype)

    def truncate(self, blocks: int) -> None:
        """Forget all but the first ``blocks`` blocks."""
        self.blocks = blocks

    def drop_front(self, blocks: int) -> None:
        """Forget the first ``blocks`` blocks and free their room."""
        step = max(1, STEP // self.quantizer.block_tokens)
        left = self.blocks - blocks
        slots = min(self.slots, grown_slots(left, left, step))
        end = min(self.slots, blocks + slots)
        self.arrays = tuple(mx.contiguous(array[:, :, blocks:end]) for array in self.arrays)
        self.blocks = left


class Side:
    """Keys or values of one layer: fp16 sinks, packed blocks, fp16 tail.

    Args:
        quantizer: codes the middle.
        sinks: first tokens kept in fp16.
        window: last tokens kept in fp16.
    """

    def __init__(self, quantizer: Quantizer, *, sinks: int = 0, window: int = 0) -> None:
        self.coded = CodedBlocks(quantizer)
        self.sinks = sinks
        self.window = window
        self.sink: mx.array | None = None
        self.tail: mx.array | None = None

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return _tokens(self.sink) + self.coded.tokens + _tokens(self.tail)

    def append(self, x: mx.array) -> None:
        """Store ``[B, H, T, D]`` fp16 behind what is held."""
        room = self.sinks - _tokens(self.sink)
        if room > 0 and not self.coded.blocks and self.tail is None:
            self.sink = _joined([self.sink, x[:, :, :room]])
            x = x[:, :, room:]
        if x.shape[2] == 0:
            return
        block = self.coded.quantizer.block_tokens
        if self.tail is not None:
            x = _joined([self.tail, x])
        n_coded = max(0, x.shape[2] - self.window) // block * block
        if n_coded:
            self.coded.append(x[:, :, :n_coded])
        self.tail = mx.contiguous(x[:, :, n_coded:]) if n_coded < x.shape[2] else None

    def fetch(self, dtype: mx.Dtype, last: int | None = None) -> mx.array:
        """Decode what is stored, or its ``last`` tokens, to ``[B, H, T, D]``."""
        skip = 0 if last is None else max(0, self.tokens - last)
        parts: list[mx.array | None] = []
        if self.sink is not None:
            parts.append(self.sink[:, :, skip:].astype(dtype) if skip < _tokens(self.sink) else None)
            skip = max(0, skip - _tokens(self.sink))
        if skip < self.coded.tokens:
            block = self.coded.quantizer.block_tokens
            decoded = self.coded.decode(dtype, skip // block)
            parts.append(decoded[:, :, skip % block :] if skip % block else decoded)
        skip = max(0, skip - self.coded.tokens)
        if self.tail is not None:
            parts.append(self.tail[:, :, skip:].astype(dtype))
        return _joined(parts)

    def trim(self, n: int) -> None:
        """Forget the last ``n`` tokens. What is left of a block that is cut returns to the tail as decoded."""
        from_tail = min(n, _tokens(self.tail))
        if self.tail is not None and from_tail:
            kept = self.tail.shape[2] - from_tail
            self.tail = mx.contiguous(self.tail[:, :, :kept]) if kept else None
        n -= from_tail
        from_coded = min(n, self.coded.tokens)
        if from_coded:
            block = self.coded.quantizer.block_tokens
            whole, rest = divmod(self.coded.tokens - from_coded, block)
            if rest:
                self.tail = mx.contiguous(self.coded.decode(mx.float16, whole, whole + 1)[:, :, :rest])
            self.coded.truncate(whole)
        n -= from_coded
        if n and self.sink is not None:
            kept = self.sink.shape[2] - n
            self.sink = mx.contiguous(self.sink[:, :, :kept]) if kept > 0 else None

    def drop_front(self, live: int) -> None:
        """Free tokens older than the last ``live`` once they fill a step; sinks do not exist on such layers."""
        block = self.coded.quantizer.block_tokens
        dead = min((self.tokens - live) // block, self.coded.blocks)
        if dead * block >= STEP:
            self.coded.drop_front(dead)

    def values_held(self, live: int | None = None) -> int:
        """Stored values (batch x heads x tokens x head_dim), of the last ``live`` tokens where given."""
        arrays = [array for array in (self.sink, *self.coded.arrays[:1], self.tail) if array is not None]
        if not arrays:
            return 0
        n_batch, n_heads = arrays[0].shape[:2]
        dense = self.tail if self.tail is not None else self.sink
        head_dim = dense.shape[3] if dense is not None else self.coded.head_dim
        tokens = self.tokens if live is None else min(self.tokens, live)
        return n_batch * n_heads * tokens * head_dim

    def held_arrays(self, name: str, live: int | None = None) -> list[HeldArray]:
        """Every array with its used slots; ``live`` counts only the last tokens as used (sliding windows)."""
        held = []
        skip = 0 if live is None else max(0, self.tokens - live)
        if self.sink is not None:
            held.append(HeldArray(f"{name}.sinks", self.sink, self.sink.shape[2], self.sink.shape[2]))
        if self.coded.arrays:
            used = self.coded.blocks - min(self.coded.blocks, skip // self.coded.quantizer.block_tokens)
            layout = self.coded.quantizer.layout(self.coded.head_dim)
            for spec, array in zip(layout, self.coded.arrays, strict=True):
                held.append(HeldArray(f"{name}.{spec.name}", array, used, array.shape[2]))
        if self.tail is not None:
            used = self.tail.shape[2] - max(0, skip - self.coded.tokens)
            held.append(HeldArray(f"{name}.window", self.tail, used, self.tail.shape[2]))
        return held


def _tokens(array: mx.array | None) -> int:
    return 0 if array is None else array.shape[2]


def _joined(parts: list[mx.array | None]) -> mx.array:
    present = [part for part in parts if part is not None]
    return present[0] if len(present) == 1 else mx.concatenate(present, axis=2)
