"""A different quantizer for every KV head of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import mlx.core as mx
import numpy as np

from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer


@QUANTIZERS.register("per_head")
@dataclass(frozen=True)
class PerHead(Quantizer):
    """Heads with equal quantizers are coded together; the arrays of each group hold that group's heads.

    Args:
        quantizers: one per KV head, all with the same number of tokens per block.
    """

    name: ClassVar[str] = "per_head"
    quantizers: tuple[Quantizer, ...]

    def __post_init__(self) -> None:
        if len({q.block_tokens for q in self.quantizers}) != 1:
            raise ValueError("the quantizers of a layer's heads must have the same block_tokens")

    @property
    def _groups(self) -> list[tuple[Quantizer, list[int]]]:
        groups: dict[Quantizer, list[int]] = {}
        for head, quantizer in enumerate(self.quantizers):
            groups.setdefault(quantizer, []).append(head)
        return list(groups.items())

    @property
    def block_tokens(self) -> int:
        """That of every head."""
        return self.quantizers[0].block_tokens

    @property
    def calibration_tokens(self) -> int:
        """The most that any head wants."""
        return max(q.calibration_tokens for q in self.quantizers)

    def check_tokens(self, x: mx.array) -> None:
        """Raise ValueError unless there is one quantizer per head of ``[B, H, T, D]``."""
        super().check_tokens(x)
        if x.shape[1] != len(self.quantizers):
            raise ValueError(f"{self.name}: {len(self.quantizers)} quantizers for {x.shape[1]} KV heads")

    def slotted(self, n_static: int) -> tuple[int, ...]:
        """Those of every group."""
        per_group = n_static // len(self._groups)  # one method per layer, so all groups calibrate alike
        own = self.quantizers[0].slotted(per_group)
        return tuple(group * per_group + array for group in range(len(self._groups)) for array in own)

    def calibrate(self, x: mx.array) -> Arrays:
        """The groups' calibrations, one after the other."""
        return tuple(a for quantizer, heads in self._groups for a in quantizer.calibrate(_heads(x, heads)))

    def follow(self, x: mx.array, static: Arrays) -> tuple[Arrays, list[int]]:
        """A slot in all groups wherever one of them needs one."""
        followed = [q.follow(_heads(x, heads), own) for q, heads, own in self._with_static(static)]
        starts = sorted({start for _, own_starts in followed for start in own_starts})
        arrays: list[mx.array] = []
        for own, own_starts in followed:
            for i, array in enumerate(own):
                if i in self.quantizers[0].slotted(len(own)) and own_starts != starts:
                    last = array.shape[2] - 1 - len(own_starts)  # the slot that held before x
                    later = [last + sum(own_start <= start for own_start in own_starts) for start in starts]
                    array = mx.take(array, mx.array([*range(last + 1), *later]), axis=2)
                arrays.append(array)
        return tuple(arrays), starts

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """The groups' layouts, one after the other; each array holds its group's heads."""
        return tuple(spec for quantizer, _ in self._groups for spec in quantizer.layout(head_dim))

    def bits_per_value(self, head_dim: int) -> Fraction:
        """Mean over the heads."""
        total = sum((q.bits_per_value(head_dim) for q in self.quantizers), Fraction(0))
        return total / len(self.quantizers)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        arrays: list[mx.array] = []
        for quantizer, heads, own in self._with_static(static):
            arrays.extend(quantizer.encode(_heads(x, heads), own).arrays)
        return tuple(arrays)

    def _decode(self, codes: Codes) -> mx.array:
        decoded, start = [], 0
        for quantizer, _, own in self._with_static(codes.static):
            stop = start + len(quantizer.layout(codes.head_dim))
            part = Codes(codes.arrays[start:stop], codes.head_dim, codes.n_tokens, own)
            decoded.append(quantizer.decode(part, mx.float32))
            start = stop
        order = np.argsort([head for _, heads in self._groups for head in heads])
        return _heads(mx.concatenate(decoded, axis=1), order.tolist())

    def _with_static(self, static: Arrays) -> list[tuple[Quantizer, list[int], Arrays]]:
        per_group = len(static) // len(self._groups)  # one method per layer, so all groups calibrate alike
        return [
            (quantizer, heads, static[i * per_group : (i + 1) * per_group])
            for i, (quantizer, heads) in enumerate(self._groups)
        ]

    def static_arrays(self, head_dim: int) -> Arrays:
        """The tables of all groups."""
        return tuple(a for quantizer, _ in self._groups for a in quantizer.static_arrays(head_dim))


def _heads(x: mx.array, heads: list[int]) -> mx.array:
    return x if heads == list(range(x.shape[1])) else mx.take(x, mx.array(heads), axis=1)
