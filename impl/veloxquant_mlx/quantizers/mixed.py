"""Quantizers that code each block of tokens with one of several variants."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from veloxquant_mlx.quantizers.base import Arrays, ArraySpec, Codes, Quantizer


@dataclass(frozen=True)
class MixedQuantizer(Quantizer):
    """Base of quantizers whose blocks differ in width.

    Its codes are ``(choices, *arrays of variant 0, *arrays of variant 1, ...)``: ``choices`` is ``[1, 1, blocks, 1]``
    uint8, and each variant holds its own blocks' tokens in time order. A cache keeps one growing stream
    per variant.
    """

    @property
    @abstractmethod
    def variants(self) -> tuple[Quantizer, ...]:
        """Per-token quantizers to choose from."""

    @abstractmethod
    def choose(self, x: mx.array) -> np.ndarray:
        """Index of the variant of every block of ``[B, H, T, D]``, uint8."""

    def take_blocks(self, x: mx.array, blocks: np.ndarray) -> mx.array:
        """The tokens of the given blocks of ``[B, H, T, D]``, in the given order."""
        index = (blocks[:, None] * self.block_tokens + np.arange(self.block_tokens)).ravel()
        return mx.take(x, mx.array(index.astype(np.int32)), axis=2)

    def split(self, x: mx.array) -> tuple[np.ndarray, list[Codes | None]]:
        """Choose and encode: the choices, and per variant the codes of its blocks (None without any)."""
        choices = self.choose(x)
        parts: list[Codes | None] = []
        for index, variant in enumerate(self.variants):
            blocks = np.flatnonzero(choices == index)
            parts.append(variant.encode(self.take_blocks(x, blocks)) if len(blocks) else None)
        return choices, parts

    def join(self, choices: np.ndarray, decoded: list[mx.array]) -> mx.array:
        """Decoded streams of the variants that occur, back in time order."""
        if len(decoded) == 1:
            return decoded[0]
        place = np.empty(len(choices), dtype=np.int64)
        place[np.argsort(choices, kind="stable")] = np.arange(len(choices))
        return self.take_blocks(mx.concatenate(decoded, axis=2), place)

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """The choice and the layout of the widest variant: an upper bound of the cost."""
        block = [
            ArraySpec(spec.name, spec.width * self.block_tokens, spec.dtype)
            for spec in self.variants[-1].layout(head_dim)
        ]
        return ArraySpec("choices", 1, mx.uint8), *block

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        choices, parts = self.split(x)
        arrays = [mx.array(choices).reshape(1, 1, -1, 1)]
        for variant, part in zip(self.variants, parts, strict=True):
            if part is None:
                layout = variant.layout(x.shape[-1])
                arrays.extend(mx.zeros((*x.shape[:2], 0, spec.width), dtype=spec.dtype) for spec in layout)
            else:
                arrays.extend(part.arrays)
        return tuple(arrays)

    def _decode(self, codes: Codes) -> mx.array:
        choices = np.array(codes.arrays[0]).ravel()
        decoded, start = [], 1
        for index, variant in enumerate(self.variants):
            stop = start + len(variant.layout(codes.head_dim))
            n_tokens = int(np.sum(choices == index)) * self.block_tokens
            if n_tokens:
                decoded.append(variant.decode(Codes(codes.arrays[start:stop], codes.head_dim, n_tokens), mx.float32))
            start = stop
        return self.join(choices, decoded)
