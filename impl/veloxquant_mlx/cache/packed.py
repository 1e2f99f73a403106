"""The cache of one attention layer: packed keys and values behind mlx-lm's cache protocol."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import mlx.core as mx
from mlx_lm.models import base as mlx_lm_base

from veloxquant_mlx.cache.storage import HeldArray, Side
from veloxquant_mlx.quantizers.base import Quantizer


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is stored.

    Attributes:
        keys: quantizer of the keys.
        values: quantizer of the values.
        sinks: first tokens kept in fp16 (0 on sliding-window layers, whose first tokens leave).
        window: last tokens kept in fp16.
        max_size: sliding window of the layer in tokens, None for full attention.
    """

    keys: Quantizer
    values: Quantizer
    sinks: int = 0
    window: int = 0
    max_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("sinks", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
        if self.max_size is not None and self.sinks:
            raise ValueError(f"sinks must be 0 on a sliding-window layer, got {self.sinks}")

    def expected_nbytes(
        self, tokens: int, *, n_batch: int = 1, n_kv_heads: int = 1, key_dim: int, value_dim: int
    ) -> int:
        """Bytes in use after ``tokens`` tokens were appended (none trimmed), from the quantizers' formulas alone."""
        per_head = Fraction(0)
        for quantizer, head_dim in ((self.keys, key_dim), (self.values, value_dim)):
            block = quantizer.block_tokens
            sinks = min(tokens, self.sinks)
            coded = max(0, tokens - sinks - self.window) // block
            dropped = 0 if self.max_size is None else max(0, tokens - self.max_size)
            tail = min(tokens - sinks - coded * block, tokens - dropped)
            live = coded - min(coded, dropped // block)
            per_head += (sinks + tail) * head_dim * 2
            per_head += live * block * head_dim * quantizer.bits_per_value(head_dim) / 8
        return int(per_head * n_batch * n_kv_heads)


def causal_mask(n_new: int, offset: int, window_size: int | None) -> mx.array:
    """mlx-lm's boolean causal mask, ``[n_new, offset + n_new]``."""
    mask: mx.array = mlx_lm_base.create_causal_mask(n_new, offset, window_size=window_size)
    return mask


def fetch_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype that attention reads: the caller's on a GPU, fp32 on CPU, where only fp32 products are fast."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu, 0) else dtype


class PackedKVCache:
    """Packed keys and values of one layer for one sequence, or for several in lockstep.

    ``update_and_fetch`` stores the new tokens and returns all of them decoded, so that attention reads what the cache
    holds; nothing decoded is kept. Keys and values enter as fp16. Works wherever mlx-lm 0.32 takes a
    ``KVCache`` or, with ``spec.max_size``, a ``RotatingKVCache``.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.offset = 0
        self._keys = Side(spec.keys, sinks=spec.sinks, window=spec.window)
        self._values = Side(spec.values, sinks=spec.sinks, window=spec.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``[B, H, L, D]`` and return everything attention may read, ``[B, H, T, D]`` each.

        On a sliding-window layer that is the last ``max_size`` tokens for one new token and
        ``max_size - 1`` before the new ones for several, oldest first.
        """
        dtype = fetch_dtype(keys.dtype)
        new = keys.shape[2]
        self._keys.append(keys.astype(mx.float16))
        self._values.append(values.astype(mx.float16))
        self.offset += new
        max_size = self.spec.max_size
        last = None if max_size is None else max_size - 1 + new
        fetched = self._keys.fetch(dtype, last), self._values.fetch(dtype, last)
        if max_size is not None:
            self._keys.drop_front(max_size)
            self._values.drop_front(max_size)
        return fetched

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask for ``N`` tokens that are about to be appended, in mlx-lm's form."""
        max_size = self.spec.max_size
        if max_size is None:
            if window_size is None and N == 1:
                return None
            if window_size is not None or return_array:
                return causal_mask(N, self.offset, window_size)
            return "causal"
        if N == 1:
            stored = min(self.offset + 1, max_size)
            if window_size is None or stored <= window_size:
                return None
            return mx.arange(stored) >= stored - window_size
        window_size = window_size or max_size
        before = min(max_size - 1, self.offset)
        if before + N > window_size or return_array:
            return causal_mask(N, before, window_size)
        return "causal"

    def size(self) -> int:
        """Tokens that attention can read."""
        return self.offset if self.spec.max_size is None else min(self.offset, self.spec.max_size)

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return not self.held_arrays()

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back: always, but for a sliding window that has dropped some."""
        return self.spec.max_size is None or self.offset < self.spec.max_size

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        self._keys.trim(n)
        self._values.trim(n)
        return n

    def held_arrays(self) -> list[HeldArray]:
        """Every array that is held for tokens."""
        live = self.spec.max_size
        return self._keys.held_arrays("keys", live) + self._values.held_arrays("values", live)

    def static_arrays(self) -> list[mx.array]:
        """Codebooks and rotations in use: shared between layers, not growing with tokens."""
        found: dict[int, mx.array] = {}
        for side in (self._keys, self._values):
            if side.coded.head_dim:
                arrays = side.coded.quantizer.static_arrays(side.coded.head_dim)
                found.update((id(array), array) for array in arrays)
        return list(found.values())

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens."""
        return sum(held.array.nbytes for held in self.held_arrays())

    def bits_per_value(self) -> Fraction:
        """Bits in use per stored key or value, from the arrays held.

        Raises:
            ValueError: the cache is empty.
        """
        values = sum(side.values_held(self.spec.max_size) for side in (self._keys, self._values))
        if not values:
            raise ValueError("an empty cache has no bits per value")
        used = sum((Fraction(h.array.nbytes * h.used_slots, h.slots) for h in self.held_arrays()), Fraction(0))
        return used * 8 / values
