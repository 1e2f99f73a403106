"""Several sequences of different lengths in one cache: one packed storage each, aligned on fetch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, Generic, Self, TypeVar

import mlx.core as mx

from veloxquant_mlx.cache.sequence import PackedSequence, TokenStore, causal_mask, fetch_dtype
from veloxquant_mlx.cache.spec import spec_from_json
from veloxquant_mlx.cache.storage import HeldArray, check_count
from veloxquant_mlx.methods import Role
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.quantizers.base import half

Single = TypeVar("Single", bound=PackedSequence)


class AlignedBatch(TokenStore, Generic[Single]):
    """A batch of single caches, with the interface of mlx-lm's ``BatchKVCache``.

    Every sequence has its own storage, so sinks, windows, groups of tokens and adaptive widths are exactly those of the
    single form, and padding is never stored. ``update_and_fetch`` decodes each and aligns them: row ``i`` starts behind
    ``left_padding[i]`` zeros, and what is shorter is padded on the right, where masks hide it.

    Args:
        spec: how to store each sequence.
        left_padding: padding tokens before each sequence's first token.

    Attributes:
        single: the class of a single cache, which a subclass names.
    """

    single: ClassVar[type[Any]]

    def __init__(self, spec: Any, left_padding: Sequence[int]) -> None:
        self.spec = spec
        self.sequences: list[Single] = [self.single(spec) for _ in left_padding]
        self._left = [int(n) for n in left_padding]
        self._idx = 0
        self._beyond = 0  # tokens before a sliding window that the last pass read
        self._remaining: list[int] | None = None
        self._right: list[int] | None = None

    @property
    def attention(self) -> str:
        """How attention reads the cache: always in decoded form."""
        return "plain (sequences of different lengths)"

    @property
    def left_padding(self) -> mx.array:
        """Padding before each sequence, ``[B]``."""
        return mx.array(self._left)

    @property
    def offset(self) -> mx.array:
        """Position of each sequence's next token, ``[B]``; negative inside its left padding."""
        return mx.array([self._idx - left for left in self._left])

    def attach_outlier_observer(self, observer: KeyNormObserver) -> None:
        """:meth:`PackedSequence.attach_outlier_observer` for every sequence."""
        for sequence in self.sequences:
            sequence.attach_outlier_observer(observer)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``[B, H, L, D]``, padding left out, and return ``[B, H, T, D]`` aligned."""
        dtype, new = keys.dtype, keys.shape[2]
        stored = half(keys), half(values)
        for sequence in self.sequences:
            sequence.begin_step()
        for i, sequence in enumerate(self.sequences):
            begin = min(new, max(0, self._left[i] - self._idx))
            count = new - begin
            if self._remaining is not None:
                count = min(count, self._remaining[i])
                self._remaining[i] -= count
            if count:
                sequence.store(*(x[i : i + 1, :, begin : begin + count] for x in stored))
            else:
                sequence.storage.idle(sequence.offset)
        self._idx += new
        width = self._idx if self.spec.max_size is None else min(self._idx, self.spec.max_size - 1 + new)
        self._beyond = width - self.size()
        return self._aligned(width, fetch_dtype(dtype), keys, values)

    def _place(self, left: int, sequence: Single, width: int) -> tuple[int, int]:
        """In an aligned row of ``width`` tokens, the padding before those of ``sequence``, and how many these are."""
        start = self._idx - width
        lead = min(width, max(0, left - start))
        held = sequence.offset - max(0, start - left)
        return lead, max(0, min(held, width - lead))

    def _aligned(
        self, width: int, dtype: mx.Dtype, like_keys: mx.array, like_values: mx.array
    ) -> tuple[mx.array, mx.array]:
        rows: list[tuple[mx.array, mx.array]] = []
        for left, sequence in zip(self._left, self.sequences, strict=True):
            lead, count = self._place(left, sequence, width)
            pair = sequence.fetch(count, dtype) if count else None
            rows.append(
                tuple(  # type: ignore[arg-type]
                    _padded(None if pair is None else pair[k], lead, width, like, dtype)
                    for k, like in enumerate((like_keys, like_values))
                )
            )
        return mx.concatenate([k for k, _ in rows]), mx.concatenate([v for _, v in rows])

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Everything attention may read, decoded and aligned, in the dtype that was last stored.

        Raises:
            ValueError: nothing was ever stored.
        """
        full = next((s for s in self.sequences if not s.empty()), None)
        if full is None:
            raise ValueError("an empty batch cache has no keys and values")
        like = [mx.zeros((1, n_heads, 0, head_dim)) for _, n_heads, head_dim in full.shapes()]
        return self._aligned(self.size() + self._beyond, getattr(mx, full.dtype_name), *like)

    def _replace(self, role: Role, x: mx.array) -> None:
        for i, (left, sequence) in enumerate(zip(self._left, self.sequences, strict=True)):
            lead, count = self._place(left, sequence, x.shape[2])
            if count:
                sequence._replace(role, x[i : i + 1, :, lead : lead + count])

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The boolean mask for ``N`` tokens that are about to be appended, ``[B, 1, N, T]``."""
        max_size = self.spec.max_size
        before = self._idx if max_size is None else min(self._idx, max_size - 1)
        window_size = window_size or max_size
        left = mx.array([n - (self._idx - before) for n in self._left])
        return causal_mask(N, before, window_size, left)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding of the tokens to come.

        Args:
            left_padding: further padding before each sequence; only while the cache is empty.
            lengths: tokens to come of each sequence, needed with ``right_padding``.
            right_padding: padding tokens behind them, until :meth:`finalize`.

        Raises:
            ValueError: left padding of a cache that holds tokens, or right padding without lengths.
        """
        if left_padding is not None:
            if self._idx:
                raise ValueError("left padding can only be added to an empty batch cache")
            self._left = [left + int(n) for left, n in zip(self._left, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("right_padding needs lengths, so that padding is not stored")
            self._right = [int(n) for n in right_padding]
            self._remaining = [int(n) for n in lengths]

    def finalize(self) -> None:
        """End right padding: the sequences are aligned at their last tokens."""
        if self._right is not None:
            self._left = [left + right for left, right in zip(self._left, self._right, strict=True)]
        self._right = self._remaining = None

    def filter(self, batch_indices: Any) -> None:
        """Keep only the given sequences, and no more padding than they need."""
        given: Any = batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices
        indices = [int(i) for i in given]
        self.sequences = [self.sequences[i] for i in indices]
        self._left = [self._left[i] for i in indices]
        least = min(self._left, default=0)
        if least > 0:
            least = min(least, self._idx)
            self._idx -= least
            self._left = [left - least for left in self._left]

    def extend(self, other: Self) -> None:
        """Take in the sequences of another batch."""
        longest = max(self._idx, other._idx)
        lefts = [left + longest - self._idx for left in self._left]
        self._left = lefts + [left + longest - other._idx for left in other._left]
        self.sequences = self.sequences + other.sequences
        self._idx = longest

    def extract(self, idx: int) -> Single:
        """A copy of one sequence in the single form."""
        return copy.deepcopy(self.sequences[idx])

    @classmethod
    def merge(cls, caches: Sequence[Single]) -> Self:
        """A batch of single caches, aligned at their last tokens.

        Raises:
            ValueError: caches of different layer specs, or a lockstep batch among them.
        """
        if any(cache.spec != caches[0].spec for cache in caches):
            raise ValueError("only caches of the same layer spec can be merged")
        if any(cache.n_batch > 1 for cache in caches):
            raise ValueError("a lockstep batch cannot be merged; take its rows first")
        longest = max(cache.offset for cache in caches)
        made = cls.__new__(cls)
        AlignedBatch.__init__(made, caches[0].spec, [longest - cache.offset for cache in caches])
        made.sequences = [copy.deepcopy(cache) for cache in caches]
        made._idx = longest
        return made

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back."""
        return self.spec.max_size is None or self._idx < self.spec.max_size

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every sequence; returns how many were forgotten."""
        n = min(self._idx, n)
        self._idx -= n
        self._beyond = 0
        for sequence in self.sequences:
            sequence.trim(n)
        return n

    def size(self) -> int:
        """Tokens of the longest sequence that attention can read, padding included."""
        return self._idx if self.spec.max_size is None else min(self._idx, self.spec.max_size)

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return all(sequence.empty() for sequence in self.sequences)

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars from which :meth:`from_state` restores the cache."""
        states = [sequence.state for sequence in self.sequences]
        flat = [item for state in states for item in state]
        lengths = [len(state) for state in states]
        return *flat, *lengths, *self._left, self._idx, len(states), self.spec.to_json()

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        *rest, self._idx, n, spec = state
        self.spec = spec_from_json(spec)
        self._left = list(rest[len(rest) - n :])
        lengths = rest[len(rest) - 2 * n : len(rest) - n]
        held = getattr(self, "sequences", [])
        sequences, start = [], 0
        for i, length in enumerate(lengths):
            part = rest[start : start + length]
            if i < len(held):
                held[i].state = part
            sequences.append(held[i] if i < len(held) else self.single.from_state(part))
            start += length
        self.sequences = sequences
        self._remaining = self._right = None
        self._beyond = 0
        check_count("the state of a batch: tokens", self._idx)
        for i, (left, sequence) in enumerate(zip(self._left, sequences, strict=True)):
            check_count(f"the state of a batch: left padding of sequence {i}", left)
            if sequence.offset and left + sequence.offset > self._idx:
                raise ValueError(
                    f"the state of a batch: sequence {i} holds {sequence.offset} tokens behind {left} of padding, but "
                    f"the batch {self._idx}"
                )

    def held_arrays(self) -> list[HeldArray]:
        """Every array that is held for tokens, sequence by sequence."""
        return [
            HeldArray(f"{i}.{held.name}", held.array, held.used_slots, held.slots)
            for i, sequence in enumerate(self.sequences)
            for held in sequence.held_arrays()
        ]

    def static_arrays(self) -> list[mx.array]:
        """Codebooks, rotations and calibrations in use: not growing with tokens."""
        arrays = [array for sequence in self.sequences for array in sequence.static_arrays()]
        return list({id(array): array for array in arrays}.values())

    def values_held(self) -> int:
        """Stored values, padding not counted."""
        return sum(sequence.values_held() for sequence in self.sequences)

    def formula_nbytes(self) -> Fraction:
        """Bytes in use from token counts and the quantizers' formulas alone."""
        return sum((sequence.formula_nbytes() for sequence in self.sequences), Fraction(0))


def _padded(x: mx.array | None, lead: int, width: int, like: mx.array, dtype: mx.Dtype) -> mx.array:
    if x is None:
        return mx.zeros((1, like.shape[1], width, like.shape[3]), dtype=dtype)
    behind = width - lead - x.shape[2]
    return mx.pad(x, [(0, 0), (0, 0), (lead, behind), (0, 0)]) if lead or behind else x
