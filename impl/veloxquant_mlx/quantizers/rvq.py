"""Residual vector quantization of rotated vectors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.lookup import lookup
from veloxquant_kernels.packing import check_code_bits
from veloxquant_kernels.turboquant import unit_rms
from veloxquant_mlx.methods import METHODS, Role, WidthOptions
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import matmul_rows, rotation

SUBVECTOR: Final = 8
"""Coordinates per codeword: one byte codes eight, so a stage costs one bit per value."""

CODEWORDS: Final = 256

_SAMPLES: Final = 1 << 15
_STEPS: Final = 15


def _assign(x: NDArray[np.float32], codewords: NDArray[np.float32]) -> NDArray[np.intp]:
    scores = x @ codewords.T - (codewords**2).sum(axis=1) / 2
    nearest: NDArray[np.intp] = np.argmax(scores, axis=1)
    return nearest


def _k_means(x: NDArray[np.float32], start: NDArray[np.float32]) -> NDArray[np.float32]:
    codewords = start
    for _ in range(_STEPS):
        nearest = _assign(x, codewords)
        counts = np.bincount(nearest, minlength=CODEWORDS)
        sums = np.stack([np.bincount(nearest, weights=column, minlength=CODEWORDS) for column in x.T], axis=1)
        codewords = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], codewords).astype(np.float32)
    return codewords


@functools.cache
def residual_codebooks(stages: int, seed: int) -> tuple[mx.array, ...]:
    """``stages`` codebooks ``[256, 8]`` fp32: k-means on Gaussian samples, each on what the ones before leave.

    The samples are seeded, so a codebook depends on ``seed`` and its stage alone.
    """
    earlier = residual_codebooks(stages - 1, seed) if stages > 1 else ()
    rng = np.random.default_rng([seed, stages])
    x = rng.standard_normal((_SAMPLES, SUBVECTOR), dtype=np.float32)
    for book in earlier:
        codewords = np.array(book)
        x = x - codewords[_assign(x, codewords)]
    return *earlier, mx.array(_k_means(x, x[:CODEWORDS]))


@QUANTIZERS.register("rvq")
@dataclass(frozen=True)
class RVQ(Quantizer):
    """Rotate, normalise, then code eight coordinates at a time with one byte per stage, each stage on the rest.

    Kept per token and head: ``code_bits`` stages of one bit per coordinate (head_dim rounded up to a multiple of
    eight) and one fp16 RMS norm, ``code_bits + 16/head_dim`` bits per value. A vector code beats the scalar one
    at one and two bits (about .33 and .11 of the energy against .36 and .12); later stages gain less.

    Source: Juang & Gray 1982, multiple stage vector quantization; for KV caches, residual vector quantization
    (arXiv 2410.15704).

    Args:
        code_bits: number of stages, 1..8.
        seed: of the rotation and the training samples.
    """

    name: ClassVar[str] = "rvq"
    code_bits: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_code_bits(self.code_bits)

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """One byte per stage and eight coordinates, and one fp16 RMS norm per token."""
        subvectors = -(-head_dim // SUBVECTOR)
        return ArraySpec("codewords", self.code_bits * subvectors, mx.uint8), ArraySpec("norms", 1, mx.float16)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        head_dim = x.shape[-1]
        unit, rms = unit_rms(x)
        rest = rotation(head_dim, self.seed).apply(unit)
        rest = mx.pad(rest, [(0, 0)] * 3 + [(0, -head_dim % SUBVECTOR)])
        rest = rest.reshape(*x.shape[:-1], -1, SUBVECTOR)
        stages = []
        for book in residual_codebooks(self.code_bits, self.seed):
            scores = matmul_rows(rest, book.T) - mx.sum(mx.square(book), axis=1) / 2
            nearest = mx.argmax(scores, axis=-1).astype(mx.uint8)
            rest = rest - lookup(book.view(mx.complex64), nearest)
            stages.append(nearest)
        return mx.concatenate(stages, axis=-1), rms.astype(mx.float16)

    def _decode(self, codes: Codes) -> mx.array:
        codewords, norms = codes.arrays
        stages = mx.split(codewords, self.code_bits, axis=-1)
        books = residual_codebooks(self.code_bits, self.seed)
        total = lookup(books[0].view(mx.complex64), stages[0])
        for book, stage in zip(books[1:], stages[1:], strict=True):
            total = total + lookup(book.view(mx.complex64), stage)
        rotated = total.reshape(*codewords.shape[:-1], -1)[..., : codes.head_dim]
        return rotation(codes.head_dim, self.seed).undo(rotated) * norms.astype(mx.float32)

    def static_arrays(self, head_dim: int) -> Arrays:
        """The stages' codebooks and the rotation."""
        return *residual_codebooks(self.code_bits, self.seed), *rotation(head_dim, self.seed).arrays


@METHODS.register("rvq")
@dataclass(frozen=True)
class RVQOptions(WidthOptions):
    """Options of :class:`RVQ`."""

    summary: ClassVar[str] = "residual vector quantization of 8 coordinates at a time"
    code_bits: int = 2

    def coded(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return RVQ(code_bits, seed)

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """Scalar codes: at high widths they leave less than residual stages."""
        return TurboQuantMSE(code_bits, seed)
