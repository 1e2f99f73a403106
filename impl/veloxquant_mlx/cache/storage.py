"""Growing packed storage of one side (keys or values) of one layer.

Tokens lie in time order as ``[sinks | coded blocks | tail]``: the first ``sinks`` tokens and the last ``window``
ones in fp16, all between as packed codes. The tail also holds tokens that do not fill a block yet, or that a
calibration still waits for. Buffers grow by at least ``STEP`` tokens and by an eighth of their size, so that
appending T tokens copies O(T) bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import mlx.core as mx
import numpy as np

from veloxquant_mlx.quantizers.base import Arrays, Codes, Quantizer
from veloxquant_mlx.quantizers.mixed import MixedQuantizer

STEP: Final = 256
"""Tokens by which a buffer grows at least."""

OnEncoded = Callable[[mx.array, mx.array, Quantizer], None]
"""Called with vectors, what they decode to, and the quantizer, for every block that is encoded."""

State = list[Any]
"""Arrays and scalars of a saved object, in the order of its ``load_state``."""


@dataclass(frozen=True)
class HeldArray:
    """One array that a cache keeps for tokens, with how much of its token axis is in use; ``slots`` is at least 1."""

    name: str
    array: mx.array
    used_slots: int
    slots: int


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {str(value)[:50]}")


def check_array(name: str, array: object, shape: tuple[int | None, ...], dtype: mx.Dtype, slots: int = 1) -> None:
    """Raise ValueError unless ``array`` is of a shape and dtype; None in ``shape`` stands for at least ``slots``."""
    if not isinstance(array, mx.array):
        raise ValueError(f"{name} must be an array, got {str(array)[:50]}")
    fits = array.ndim == len(shape) and all(
        size >= slots if wanted is None else size == wanted for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        wanted = str(shape).replace("None", f"{slots} or more")
        raise ValueError(f"{name} must be {dtype} of shape {wanted}, got {array.dtype} {tuple(array.shape)}")


def grown_slots(needed: int, used: int, step: int) -> int:
    """Slots to allocate for ``needed`` when ``used`` are held: whole steps, an eighth ahead when growing."""
    wanted = max(needed, used + used // 8)
    return -(-wanted // step) * step


def appended(buffer: mx.array | None, new: mx.array, used: int, step: int) -> mx.array:
    """``buffer`` with ``new`` written behind its first ``used`` slots of axis 2, grown where it must."""
    total = used + new.shape[2]
    if buffer is None or total > buffer.shape[2]:
        room = list(new.shape)
        room[2] = grown_slots(total, used, step) - used
        empty = mx.zeros(room, dtype=new.dtype)
        buffer = empty if buffer is None or used == 0 else mx.concatenate([buffer[:, :, :used], empty], axis=2)
    buffer = buffer[:, :, :]  # assignment changes the Python object, which another cache's state may share
    buffer[:, :, used:total] = new
    return buffer


class CodedBlocks:
    """Packed blocks of tokens in growing buffers ``[B, H, slots, width]``, oldest first."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.arrays: Arrays = ()
        self.static: Arrays | None = None
        self.starts: mx.array | None = None
        """Blocks at which the calibration's second and further slots begin, ``[slots - 1]`` int32; None without."""
        self.head_dim = 0
        self.blocks = 0

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.blocks * self.quantizer.block_tokens

    @property
    def step(self) -> int:
        """Blocks by which buffers grow at least."""
        return max(1, STEP // self.quantizer.block_tokens)

    def append(self, x: mx.array, on_encoded: OnEncoded | None = None) -> None:
        """Encode ``[B, H, T, D]`` (whole blocks) behind what is held; the first call also calibrates."""
        if self.static is None:
            first = self.quantizer.calibration_tokens
            self.static = self.quantizer.calibrate(x[:, :, :first] if first else x)
            self.head_dim = x.shape[-1]
        self._follow(x)
        codes = self.quantizer.encode(x, self._static(self.blocks, self.blocks + x.shape[2]))
        if on_encoded is not None:
            on_encoded(x, self.quantizer.decode(codes, mx.float32), self.quantizer)
        self.extend(codes)

    def _follow(self, x: mx.array) -> None:
        assert self.static is not None
        self.static, starts = self.quantizer.follow(x, self.static)
        if starts:
            held = [] if self.starts is None else [self.starts]
            self.starts = mx.concatenate([*held, mx.array(starts, dtype=mx.int32) + self.blocks])

    def _static(self, first: int, last: int) -> Arrays:
        """The calibration of blocks ``first`` up to ``last``: a slot for each where there are several."""
        static = self.static or ()
        if self.starts is None:
            return static
        slots = mx.array(np.searchsorted(np.array(self.starts), np.arange(first, last), side="right"))
        slotted = self.quantizer.slotted(len(static))
        return tuple(mx.take(array, slots, axis=2) if i in slotted else array for i, array in enumerate(static))

    def _keep_slots(self, first: int, last: int, shift: int) -> None:
        """Keep the slots ``first`` up to ``last``, and begin them ``shift`` blocks earlier."""
        assert self.static is not None
        assert self.starts is not None
        slotted = self.quantizer.slotted(len(self.static))
        kept = [mx.contiguous(a[:, :, first:last]) if i in slotted else a for i, a in enumerate(self.static)]
        self.static, self.starts = tuple(kept), self.starts[first : last - 1] - shift if last - first > 1 else None

    def extend(self, codes: Codes) -> None:
        """Put encoded blocks behind what is held."""
        self.head_dim = codes.head_dim
        held: Sequence[mx.array | None] = self.arrays or [None] * len(codes.arrays)
        self.arrays = tuple(
            appended(buffer, new, self.blocks, self.step) for buffer, new in zip(held, codes.arrays, strict=True)
        )
        self.blocks += codes.n_tokens // self.quantizer.block_tokens

    def decode(self, dtype: mx.Dtype, first: int = 0, last: int | None = None) -> mx.array:
        """Decode blocks ``first`` up to ``last`` (all held by default) to ``[B, H, T, D]``."""
        last = self.blocks if last is None else last
        n_tokens = (last - first) * self.quantizer.block_tokens
        arrays = tuple(array[:, :, first:last] for array in self.arrays)
        return self.quantizer.decode(Codes(arrays, self.head_dim, n_tokens, self._static(first, last)), dtype)

    def truncate(self, blocks: int) -> None:
        """Forget all but the first ``blocks`` blocks; with the last one goes the calibration."""
        self.blocks = blocks
        if not blocks:
            self.static = self.starts = None
        elif self.starts is not None:
            self._keep_slots(0, 1 + int(np.sum(np.array(self.starts) < blocks)), 0)

    def drop_front(self, blocks: int) -> None:
        """Forget the first ``blocks`` blocks and free their room; the calibration stays."""
        left = self.blocks - blocks
        keep = grown_slots(left, 0, self.step)
        self.arrays = tuple(mx.contiguous(array[:, :, blocks : blocks + keep]) for array in self.arrays if left)
        self.blocks = left
        if self.starts is not None:
            self._keep_slots(int(np.sum(np.array(self.starts) <= blocks)), len(self.starts) + 1, blocks)

    def held_arrays(self, name: str, skip: int = 0) -> list[HeldArray]:
        """The buffers; the first ``skip`` blocks do not count as used."""
        layout = self.quantizer.layout(self.head_dim) if self.arrays else ()
        held = [
            HeldArray(f"{name}.{spec.name}", array, self.blocks - skip, array.shape[2])
            for spec, array in zip(layout, self.arrays, strict=True)
        ]
        if self.starts is not None and self.static is not None:
            held.append(HeldArray(f"{name}.starts", self.starts, len(self.starts), len(self.starts)))
            for i in self.quantizer.slotted(len(self.static)):  # the first slot is the calibration's, not a token's
                held.append(HeldArray(f"{name}.slots", self.static[i], len(self.starts), len(self.starts) + 1))
        return held

    def stretch_bytes(self) -> int:
        """Bytes of the calibration's second and further slots."""
        if self.starts is None or self.static is None:
            return 0
        slots = (self.static[i] for i in self.quantizer.slotted(len(self.static)))
        per_start = 4 + sum(slot.shape[0] * slot.shape[1] * slot.shape[3] * 2 for slot in slots)
        return len(self.starts) * per_start

    def formula_bits(self, skip: int = 0) -> Fraction:
        """Bits per head in use by the quantizer's own formula, without its first ``skip`` blocks."""
        values = (self.blocks - skip) * self.quantizer.block_tokens * self.head_dim
        return values * self.quantizer.bits_per_value(self.head_dim) if values else Fraction(0)

    def static_arrays(self) -> list[mx.array]:
        """The quantizer's tables and this cache's calibration."""
        if self.static is None:
            return []
        slotted = self.quantizer.slotted(len(self.static))
        own = [
            array[:, :, :1] if i in slotted and self.starts is not None else array
            for i, array in enumerate(self.static)
        ]
        return [*self.quantizer.static_arrays(self.head_dim), *own]

    def state(self) -> State:
        """Buffers first, then calibration, with its slots' beginnings where it has several, and counts."""
        calibrated = self.static is not None
        static = [*(self.static or ()), *([] if self.starts is None else [self.starts])]
        return [*self.arrays, *static, len(self.arrays), calibrated, self.head_dim, self.blocks]

    def load_state(self, state: State) -> None:
        """Take what :meth:`state` gave."""
        *arrays, n_arrays, calibrated, self.head_dim, self.blocks = state
        self.arrays, static = tuple(arrays[:n_arrays]), arrays[n_arrays:]
        self.starts = static.pop() if static and static[-1].ndim == 1 else None
        self.static = tuple(static) if calibrated else None

    def check(self, name: str, n_batch: int, n_heads: int, head_dim: int) -> None:
        """Raise ValueError unless the arrays are those of ``blocks`` blocks of ``[n_batch, n_heads, *, head_dim]``."""
        check_count(f"{name}.blocks", self.blocks)
        if not self.blocks:
            return
        if self.head_dim != head_dim or self.static is None:
            raise ValueError(f"{name} are of head_dim {self.head_dim}, calibrated {self.static is not None}")
        like = self.quantizer.encode(mx.zeros((n_batch, n_heads, 0, head_dim), dtype=mx.float16))
        if len(self.arrays) != len(like.arrays):
            raise ValueError(f"{name} are {len(self.arrays)} arrays, not {len(like.arrays)}")
        for array, wanted in zip(self.arrays, like.arrays, strict=True):
            check_array(name, array, (*wanted.shape[:2], None, wanted.shape[3]), wanted.dtype, self.blocks)
        slotted, slots = self.quantizer.slotted(len(self.static)), 1
        if self.starts is not None:
            check_array(f"{name}.starts", self.starts, (None,), mx.int32)
            slots += len(self.starts)
            edges = np.array(self.starts)
            if not slotted or edges[0] <= 0 or edges[-1] >= self.blocks or np.any(np.diff(edges) <= 0):
                raise ValueError(f"{name}.starts must ascend within the {self.blocks} blocks")
        for i, (array, wanted) in enumerate(zip(self.static, like.static, strict=len(self.static) > len(like.static))):
            shape = *wanted.shape[:2], slots if i in slotted else wanted.shape[2], wanted.shape[3]
            check_array(f"{name}.calibration", array, shape, wanted.dtype)

    def rows(self, index: slice) -> None:
        """Keep only some sequences of the batch."""
        self.arrays = tuple(mx.contiguous(array[index]) for array in self.arrays)
        if self.static is not None:
            self.static = tuple(mx.contiguous(array[index]) for array in self.static)


class MixedBlocks:
    """Blocks of a :class:`MixedQuantizer`: one stream of blocks per variant, and each block's choice."""

    def __init__(self, quantizer: MixedQuantizer) -> None:
        self.quantizer = quantizer
        self.streams = [CodedBlocks(variant) for variant in quantizer.variants]
        self.choices: mx.array | None = None
        self.blocks = 0
        self.head_dim = 0

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.blocks * self.quantizer.block_tokens

    def append(self, x: mx.array, on_encoded: OnEncoded | None = None) -> None:
        """Choose and encode whole blocks of ``[B, H, T, D]`` behind what is held."""
        self.head_dim = x.shape[-1]
        choices, parts = self.quantizer.split(x)
        self.choices = appended(
            self.choices,
            mx.array(choices).reshape(1, 1, -1, 1),
            self.blocks,
            max(1, STEP // self.quantizer.block_tokens),
        )
        self.blocks += len(choices)
        for index, (stream, codes) in enumerate(zip(self.streams, parts, strict=True)):
            if codes is None:
                continue
            stream.static = ()
            stream.extend(codes)
            if on_encoded is not None:
                vectors = self.quantizer.take_blocks(x, np.flatnonzero(choices == index))
                on_encoded(vectors, stream.quantizer.decode(codes, mx.float32), stream.quantizer)

    def _chosen(self) -> np.ndarray:
        assert self.choices is not None
        return np.array(self.choices[0, 0, : self.blocks, 0])

    def _counts(self, blocks: int) -> list[int]:
        if not blocks:
            return [0] * len(self.streams)
        counts: list[int] = np.bincount(self._chosen()[:blocks], minlength=len(self.streams)).tolist()
        return counts

    def decode(self, dtype: mx.Dtype, first: int = 0, last: int | None = None) -> mx.array:
        """Decode blocks ``first`` up to ``last`` (all held by default) to ``[B, H, T, D]``."""
        last = self.blocks if last is None else last
        size = self.quantizer.block_tokens
        decoded = [
            stream.decode(dtype, begin * size, end * size)
            for stream, begin, end in zip(self.streams, self._counts(first), self._counts(last), strict=True)
            if end > begin
        ]
        return self.quantizer.join(self._chosen()[first:last], decoded)

    def truncate(self, blocks: int) -> None:
        """Forget all but the first ``blocks`` blocks."""
        for stream, count in zip(self.streams, self._counts(blocks), strict=True):
            stream.truncate(count * self.quantizer.block_tokens)
        self.blocks = blocks

    def drop_front(self, blocks: int) -> None:
        """Forget the first ``blocks`` blocks and free their room."""
        for stream, count in zip(self.streams, self._counts(blocks), strict=True):
            if count:
                stream.drop_front(count * self.quantizer.block_tokens)
        assert self.choices is not None
        self.choices = mx.contiguous(self.choices[:, :, blocks:]) if blocks < self.blocks else None
        self.blocks -= blocks

    def held_arrays(self, name: str, skip: int = 0) -> list[HeldArray]:
        """The choices and the streams' buffers; the first ``skip`` blocks do not count as used."""
        if self.choices is None:
            return []
        held = [HeldArray(f"{name}.choices", self.choices, self.blocks - skip, self.choices.shape[2])]
        for stream, count in zip(self.streams, self._counts(skip), strict=True):
            bits = getattr(stream.quantizer, "code_bits", stream.quantizer.name)
            held.extend(stream.held_arrays(f"{name}.{bits}", count * self.quantizer.block_tokens))
        return held

    def formula_bits(self, skip: int = 0) -> Fraction:
        """Bits per head in use by the variants' formulas, without the choices and the first ``skip`` blocks."""
        skipped = [count * self.quantizer.block_tokens for count in self._counts(skip)]
        return sum((s.formula_bits(n) for s, n in zip(self.streams, skipped, strict=True)), Fraction(0))

    def static_arrays(self) -> list[mx.array]:
        """The variants' tables."""
        return [array for stream in self.streams for array in stream.static_arrays()]

    def state(self) -> State:
        """The streams' states one after the other, then the choices and counts."""
        states = [stream.state() for stream in self.streams]
        flat = [item for state in states for item in state]
        return [*flat, self.choices, *[len(state) for state in states], self.head_dim, self.blocks]

    def load_state(self, state: State) -> None:
        """Take what :meth:`state` gave."""
        n_streams = len(self.streams)
        self.head_dim, self.blocks = state[-2:]
        lengths = state[-2 - n_streams : -2]
        self.choices = state[-3 - n_streams]
        start = 0
        for stream, length in zip(self.streams, lengths, strict=True):
            stream.load_state(state[start : start + length])
            start += length

    def check(self, name: str, n_batch: int, n_heads: int, head_dim: int) -> None:
        """Raise ValueError unless the streams hold the blocks that the choices give them."""
        check_count(f"{name}.blocks", self.blocks)
        if self.blocks:
            check_array(f"{name}.choices", self.choices, (1, 1, None, 1), mx.uint8, self.blocks)
            if np.max(self._chosen()) >= len(self.streams):
                raise ValueError(f"{name}.choices must be below {len(self.streams)}")
        for i, (stream, count) in enumerate(zip(self.streams, self._counts(self.blocks), strict=True)):
            if stream.blocks != count * self.quantizer.block_tokens:
                raise ValueError(f"{name} of width {i} hold {stream.blocks} tokens where the choices give it {count}")
            stream.check(f"{name} of width {i}", n_batch, n_heads, head_dim)

    def rows(self, index: slice) -> None:
        """Keep only some sequences of the batch; their blocks keep the choices they were coded with."""
        for stream in self.streams:
            stream.rows(index)
        if self.choices is not None:
            self.choices = mx.contiguous(self.choices)


class Side:
    """Keys or values of one layer: fp16 sinks, packed blocks, fp16 tail.

    Args:
        quantizer: codes the middle.
        sinks: first tokens kept in fp16.
        window: last tokens kept in fp16.
        on_encoded: is told of every block that is encoded.
    """

    def __init__(
        self, quantizer: Quantizer, *, sinks: int = 0, window: int = 0, on_encoded: OnEncoded | None = None
    ) -> None:
        self.coded = MixedBlocks(quantizer) if isinstance(quantizer, MixedQuantizer) else CodedBlocks(quantizer)
        self.sinks = sinks
        self.window = window
        self.on_encoded = on_encoded
        self.sink: mx.array | None = None
        self.tail: mx.array | None = None
        self.shape: tuple[int, int, int] | None = None

    @property
    def quantizer(self) -> Quantizer:
        """What codes the middle."""
        return self.coded.quantizer

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return _tokens(self.sink) + self.coded.tokens + _tokens(self.tail)

    @property
    def coded_range(self) -> tuple[int, int]:
        """First held token that is coded, and the first behind it that is not."""
        start = _tokens(self.sink)
        return start, start + self.coded.tokens

    def append(self, x: mx.array) -> None:
        """Store ``[B, H, T, D]`` fp16 behind what is held."""
        self.shape = (x.shape[0], x.shape[1], x.shape[3])
        room = self.sinks - _tokens(self.sink)
        if room > 0 and x.shape[2] and not self.coded.blocks and self.tail is None:
            self.sink = mx.contiguous(_joined([self.sink, x[:, :, :room]]))  # a view would keep all of x alive
            x = x[:, :, room:]
        if x.shape[2] == 0:
            return
        x = _joined([self.tail, x])
        block = self.quantizer.block_tokens
        n_coded = max(0, x.shape[2] - self.window) // block * block if x.shape[3] else 0  # no values, nothing to code
        if n_coded < self.quantizer.calibration_tokens and not self.coded.blocks:
            n_coded = 0
        if n_coded:
            self.coded.append(x[:, :, :n_coded], self.on_encoded)
        self.tail = mx.contiguous(x[:, :, n_coded:]) if n_coded < x.shape[2] else None

    def fetch(self, dtype: mx.Dtype, skip: int = 0) -> mx.array:
        """Decode what is held but its first ``skip`` tokens to ``[B, H, T, D]``."""
        parts: list[mx.array | None] = []
        if self.sink is not None and skip < self.sink.shape[2]:
            parts.append(self.sink[:, :, skip:].astype(dtype))
        start, stop = self.coded_range
        if skip < stop and stop > start:
            first, rest = divmod(max(0, skip - start), self.quantizer.block_tokens)
            decoded = self.coded.decode(dtype, first)
            parts.append(decoded[:, :, rest:] if rest else decoded)
        if self.tail is not None:
            parts.append(self.tail[:, :, max(0, skip - stop) :].astype(dtype))
        if not parts and self.shape is not None:  # everything was trimmed
            n_batch, n_heads, head_dim = self.shape
            return mx.zeros((n_batch, n_heads, 0, head_dim), dtype=dtype)
        return _joined(parts)

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; what is left of a block that is cut returns to the tail as decoded.

        Returns:
            How many tokens returned.
        """
        from_tail = min(n, _tokens(self.tail))
        if from_tail:
            self.tail = _first(self.tail, -from_tail)
        n -= from_tail
        from_coded = min(n, self.coded.tokens)
        rest = 0
        if from_coded:
            whole, rest = divmod(self.coded.tokens - from_coded, self.quantizer.block_tokens)
            if rest:
                self.tail = mx.contiguous(self.coded.decode(mx.float16, whole, whole + 1)[:, :, :rest])
            self.coded.truncate(whole)
        n -= from_coded
        if n:
            self.sink = _first(self.sink, -n)
        return rest

    def drop_front(self, live: int) -> int:
        """Free tokens older than the last ``live`` once they fill a step; returns how many went."""
        block = self.quantizer.block_tokens
        dead = min(max(0, self.tokens - live) // block, self.coded.blocks)
        if dead * block < STEP:
            return 0
        self.coded.drop_front(dead)
        return dead * block

    def values_held(self, skip: int = 0) -> int:
        """Stored values (batch x heads x tokens x head_dim) behind the first ``skip`` tokens."""
        if self.shape is None:
            return 0
        n_batch, n_heads, head_dim = self.shape
        return n_batch * n_heads * (self.tokens - skip) * head_dim

    def held_arrays(self, name: str, skip: int = 0) -> list[HeldArray]:
        """Every array with its used slots; the first ``skip`` tokens do not count as used."""
        held = []
        if self.sink is not None:
            held.append(HeldArray(f"{name}.sinks", self.sink, self.sink.shape[2], self.sink.shape[2]))
        held.extend(self.coded.held_arrays(name, self._dead_blocks(skip)))
        if self.tail is not None:
            used = self.tail.shape[2] - max(0, skip - self.coded.tokens)
            held.append(HeldArray(f"{name}.window", self.tail, used, self.tail.shape[2]))
        return held

    def _dead_blocks(self, skip: int) -> int:
        return min(self.coded.blocks, skip // self.quantizer.block_tokens)

    def formula_bytes(self, skip: int = 0) -> Fraction:
        """Bytes in use from token counts and the quantizer's formula alone."""
        if self.shape is None:
            return Fraction(0)
        n_batch, n_heads, head_dim = self.shape
        dense = _tokens(self.sink) + _tokens(self.tail) - max(0, skip - self.coded.tokens)
        dead = self._dead_blocks(skip)
        shared = self.coded.blocks - dead if isinstance(self.coded, MixedBlocks) else self.coded.stretch_bytes()
        return n_batch * n_heads * (dense * head_dim * 2 + self.coded.formula_bits(dead) / 8) + shared

    def state(self) -> State:
        """The coded blocks' state, then sinks, tail, counts."""
        coded = self.coded.state()
        return [*coded, self.sink, self.tail, *(self.shape or (0, 0, 0)), len(coded)]

    def load_state(self, state: State) -> None:
        """Take what :meth:`state` gave."""
        *coded, self.sink, self.tail, n_batch, n_heads, head_dim, n_coded = state
        self.shape = (n_batch, n_heads, head_dim) if n_batch else None
        self.coded.load_state(coded[:n_coded])

    def check(self, name: str) -> None:
        """Raise ValueError unless a loaded state's counts and shapes agree with its arrays."""
        n_batch, n_heads, head_dim = self.shape or (0, 0, 0)
        for field in (n_batch, n_heads, head_dim):
            check_count(f"{name}: shape", field)
        self.coded.check(f"{name}: codes", n_batch, n_heads, head_dim)
        for array, part in ((self.sink, "sinks"), (self.tail, "window")):
            if array is not None:
                check_array(f"{name}: {part}", array, (n_batch, n_heads, None, head_dim), mx.float16)
        if _tokens(self.sink) > self.sinks:
            raise ValueError(f"{name}: {_tokens(self.sink)} sinks are held where the spec has {self.sinks}")

    def rows(self, index: slice) -> None:
        """Keep only some sequences of the batch."""
        if self.shape is not None:
            self.shape = (len(range(*index.indices(self.shape[0]))), *self.shape[1:])
        self.sink = None if self.sink is None else mx.contiguous(self.sink[index])
        self.tail = None if self.tail is None else mx.contiguous(self.tail[index])
        self.coded.rows(index)


def _tokens(array: mx.array | None) -> int:
    return 0 if array is None else array.shape[2]


def _first(array: mx.array | None, stop: int) -> mx.array | None:
    if array is None or array.shape[2] + stop <= 0:
        return None
    return mx.contiguous(array[:, :, :stop])


def _joined(parts: Sequence[mx.array | None]) -> mx.array:
    present = [part for part in parts if part is not None]
    return present[0] if len(present) == 1 else mx.concatenate(present, axis=2)
