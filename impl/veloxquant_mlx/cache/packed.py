"""The caches of one attention layer behind mlx-lm's cache protocol: of one sequence, and of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx

from veloxquant_mlx.cache.batch import AlignedBatch
from veloxquant_mlx.cache.sequence import PackedSequence, bits_in_use, causal_mask, fetch_dtype
from veloxquant_mlx.cache.spec import LayerSpec

__all__ = ["BatchPackedKVCache", "LayerSpec", "PackedKVCache", "bits_in_use"]


class PackedKVCache(PackedSequence):
    """Packed keys and values of one layer for one sequence, or for several in lockstep.

    ``update_and_fetch`` stores the new tokens and returns all of them decoded, so that attention reads what the cache
    holds; nothing decoded is kept. Keys and values enter as fp16. Works wherever mlx-lm 0.32 takes a
    ``KVCache`` or, with ``spec.max_size``, a ``RotatingKVCache``.

    Args:
        spec: how to store.
        outlier_observer: flags tokens for ``spec.outlier_keys`` and ``spec.outlier_values``; a cache whose spec has
            these stores nothing without one (:meth:`attach_outlier_observer`).
        distortion_observer: is told of everything that is encoded.

    Attributes:
        not_fused: why attention does not read the packed arrays directly, where a builder or a loader has said so.
    """

    not_fused: str | None = None

    @property
    def attention(self) -> str:
        """How attention reads the cache: ``plain`` decodes every token of every step, with the reason if known."""
        if self.keep_decoded:
            return "plain (decoded tokens kept beside the coded ones to save time)"
        return "plain" if self.not_fused is None else f"plain ({self.not_fused})"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``[B, H, L, D]`` and return everything attention may read, ``[B, H, T, D]`` each.

        On a sliding-window layer that is the last ``max_size`` tokens for one new token and ``max_size - 1`` before
        the new ones for several, oldest first.
        """
        new = keys.shape[2]
        self.begin_step()
        self.store(keys, values)
        max_size = self.max_size
        wanted = self.offset if max_size is None else min(self.offset, max_size - 1 + new)
        self._beyond = wanted - self.size()
        return self.fetch(wanted, fetch_dtype(keys.dtype))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask for ``N`` tokens that are about to be appended, in mlx-lm's form."""
        max_size = self.max_size
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

    @classmethod
    def merge(cls, caches: Sequence[PackedKVCache]) -> BatchPackedKVCache:
        """A batch form of several caches; see :meth:`AlignedBatch.merge`."""
        return BatchPackedKVCache.merge(caches)


class BatchPackedKVCache(AlignedBatch[PackedKVCache]):
    """The batch form of :class:`PackedKVCache`: mlx-lm's ``BatchKVCache`` of packed sequences."""

    single: ClassVar[type[Any]] = PackedKVCache
