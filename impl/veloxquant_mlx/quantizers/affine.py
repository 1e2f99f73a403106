"""Uniform codes between a group's minimum and maximum: along the vector, or along tokens as in KIVI."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np
from scipy import special

from veloxquant_kernels.affine import affine_quantize_pack, affine_unpack_dequantize
from veloxquant_kernels.packing import check_code_bits, packed_words
from veloxquant_mlx.methods import METHODS, Role, WidthOptions
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer
from veloxquant_mlx.quantizers.lloyd_max import Gaussian


@functools.cache
def min_max_distortion(group_size: int, code_bits: int) -> float:
    """Mean square error over mean square of min-max codes of ``group_size`` independent N(0, 1) values.

    The two extremes are exact; the others are N(0, 1) truncated to lie between them. Integrated over the joint density
    of minimum and maximum.
    """
    density = Gaussian().density
    grid = np.linspace(-6, 6, 241)
    low, high = (side.ravel() for side in np.meshgrid(grid, grid, indexing="ij"))
    low, high = low[low < high], high[low < high]
    inside = special.ndtr(high) - special.ndtr(low)
    joint = density(low) * density(high) * inside ** (group_size - 2)
    likely = joint > 1e-12 * joint.max()
    low, high, inside, joint = low[likely], high[likely], inside[likely], joint[likely]
    step = (high - low) / ((1 << code_bits) - 1)
    error = np.zeros_like(inside)
    for code in range(1 << code_bits):
        level = low + code * step
        below, above = (
            (1 + level**2) * special.ndtr(x) - (x - 2 * level) * density(x)
            for x in (np.maximum(level - step / 2, low), np.minimum(level + step / 2, high))
        )
        error += above - below
    return float(np.sum(joint * error / inside) / np.sum(joint) * (group_size - 2) / group_size)


@dataclass(frozen=True)
class GroupQuantizer(Quantizer):
    """What codes between the extremes of groups of ``group_size`` values has: a width, and groups of two or more."""

    code_bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        check_code_bits(self.code_bits)
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(f"group_size must be an int of at least 2, got {self.group_size!r}")


@QUANTIZERS.register("affine")
@dataclass(frozen=True)
class Affine(GroupQuantizer):
    """Groups of neighbouring channels of one token, each with an fp16 scale and an fp16 zero point.

    Kept per token and head: ``code_bits`` per coordinate and 32 bits per group, ``code_bits + 32/group_size`` bits
    per value where groups divide head_dim (the last group is shorter where not).

    Source: asymmetric min-max quantization as in KIVI (arXiv 2402.02750), section 3; mlx-lm's QuantizedKVCache.

    Args:
        code_bits: width of a code, 1..8.
        group_size: channels per group.
    """

    name: ClassVar[str] = "affine"

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed codes, scales, zero points."""
        groups = -(-head_dim // self.group_size)
        return (
            ArraySpec("codes", packed_words(head_dim, self.code_bits), mx.uint32),
            ArraySpec("scales", groups, mx.float16),
            ArraySpec("zeros", groups, mx.float16),
        )

    def expected_distortion(self, head_dim: int) -> float:
        """On vectors that are Gaussian as they are: there is no rotation to make them so."""
        whole, rest = divmod(head_dim, self.group_size)
        energy = whole * self.group_size * min_max_distortion(self.group_size, self.code_bits)
        return (energy + (rest * min_max_distortion(rest, self.code_bits) if rest > 2 else 0)) / head_dim

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        return affine_quantize_pack(x, self.code_bits, self.group_size)

    def _decode(self, codes: Codes) -> mx.array:
        words, scales, zeros = codes.arrays
        return affine_unpack_dequantize(
            words, scales, zeros, self.code_bits, codes.head_dim, self.group_size, mx.float32
        )


@METHODS.register("affine")
@dataclass(frozen=True)
class AffineOptions(WidthOptions):
    """Options of :class:`Affine`."""

    summary: ClassVar[str] = "fp16 scale and zero point per group of channels, at every width"
    group_size: int = 32

    def coded(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return Affine(code_bits, self.group_size)
