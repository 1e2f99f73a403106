"""Uniform codes between a group's minimum and maximum: along the vector, or along tokens as in KIVI."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np
from scipy import special, stats

from veloxquant_mlx.methods import METHODS, MethodOptions, Role
from veloxquant_mlx.packing import check_code_bits, pack_codes, packed_words, unpack_codes
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer

SMALLEST_SCALE = 2.0**-24
"""The least positive fp16: a group of equal values gets scale 0 and code 0."""


def uniform_codes(x: mx.array, code_bits: int, axis: int) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, fp16 scales and fp16 zero points of groups along ``axis`` (kept with length 1).

    The codes are computed against the rounded scale and zero point, the ones that decoding will use.
    """
    x = x.astype(mx.float32)
    top = (1 << code_bits) - 1
    low, high = mx.min(x, axis=axis, keepdims=True), mx.max(x, axis=axis, keepdims=True)
    zeros = low.astype(mx.float16)
    scales = ((high - low) * (1 / top)).astype(mx.float16)
    steps = mx.maximum(scales.astype(mx.float32), SMALLEST_SCALE)
    codes = mx.clip(mx.round((x - zeros.astype(mx.float32)) / steps), 0, top)
    return codes.astype(mx.uint8), scales, zeros


@functools.cache
def min_max_distortion(group_size: int, code_bits: int) -> float:
    """Mean square error over mean square of min-max codes of ``group_size`` independent N(0, 1) values.

    The two extremes are exact; the others are N(0, 1) truncated to lie between them. Integrated over the joint density
    of minimum and maximum.
    """
    grid = np.linspace(-6, 6, 241)
    low, high = (side.ravel() for side in np.meshgrid(grid, grid, indexing="ij"))
    low, high = low[low < high], high[low < high]
    inside = special.ndtr(high) - special.ndtr(low)
    joint = stats.norm.pdf(low) * stats.norm.pdf(high) * inside ** (group_size - 2)
    likely = joint > 1e-12 * joint.max()
    low, high, inside, joint = low[likely], high[likely], inside[likely], joint[likely]
    step = (high - low) / ((1 << code_bits) - 1)
    error = np.zeros_like(inside)
    for code in range(1 << code_bits):
        level = low + code * step
        below, above = (
            (1 + level**2) * special.ndtr(x) - (x - 2 * level) * stats.norm.pdf(x)
            for x in (np.maximum(level - step / 2, low), np.minimum(level + step / 2, high))
        )
        error += above - below
    return float(np.sum(joint * error / inside) / np.sum(joint) * (group_size - 2) / group_size)


def check_group(group_size: int) -> None:
    """Raise ValueError for a group size below 2."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(f"group_size must be an int of at least 2, got {group_size!r}")


@QUANTIZERS.register("affine")
@dataclass(frozen=True)
class Affine(Quantizer):
    """Groups of neighbouring channels of one token, each with an fp16 scale and an fp16 zero point.

    Kept per token and head: ``code_bits`` per coordinate and 32 bits per group, ``code_bits + 32/group_size`` bits
    per value where groups divide head_dim (the last group is shorter where not).

    Source: asymmetric min-max quantization as in KIVI (arXiv 2402.02750), section 3; mlx-lm's QuantizedKVCache.

    Args:
        code_bits: width of a code, 1..8.
        group_size: channels per group.
    """

    name: ClassVar[str] = "affine"
    code_bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        check_code_bits(self.code_bits)
        check_group(self.group_size)

    def _groups(self, head_dim: int) -> int:
        return -(-head_dim // self.group_size)

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed codes, scales, zero points."""
        groups = self._groups(head_dim)
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

    def _grouped(self, x: mx.array) -> mx.array:
        missing = -x.shape[-1] % self.group_size
        if missing:  # repeating a value changes neither minimum nor maximum
            x = mx.concatenate([x, mx.repeat(x[..., -1:], missing, axis=-1)], axis=-1)
        return x.reshape(*x.shape[:-1], -1, self.group_size)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        codes, scales, zeros = uniform_codes(self._grouped(x), self.code_bits, -1)
        flat = codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
        return pack_codes(flat, self.code_bits), scales[..., 0], zeros[..., 0]

    def _decode(self, codes: Codes) -> mx.array:
        words, scales, zeros = codes.arrays
        groups = self._groups(codes.head_dim)
        padded = groups * self.group_size
        steps = unpack_codes(words, self.code_bits, codes.head_dim)
        if padded != codes.head_dim:
            steps = mx.pad(steps, [(0, 0)] * 3 + [(0, padded - codes.head_dim)])
        grouped = steps.reshape(*words.shape[:-1], groups, self.group_size).astype(mx.float32)
        x = grouped * scales[..., None].astype(mx.float32) + zeros[..., None].astype(mx.float32)
        return x.reshape(*words.shape[:-1], padded)[..., : codes.head_dim]


@METHODS.register("affine")
@dataclass(frozen=True)
class AffineOptions(MethodOptions):
    """Options of :class:`Affine`."""

    summary: ClassVar[str] = "fp16 scale and zero point per group of channels, at every width"
    code_bits: int = 4
    group_size: int = 32

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return Affine(self.code_bits if code_bits is None else code_bits, self.group_size)
