"""TurboQuant, the variant that minimises mean squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxquant_mlx.methods import METHODS, MethodOptions, Role
from veloxquant_mlx.packing import check_code_bits, pack_codes, packed_words
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer
from veloxquant_mlx.quantizers.lloyd_max import Codebook
from veloxquant_mlx.quantizers.scalar import codebook_arrays, decode_words, nearest_codes, sphere_codebook
from veloxquant_mlx.transforms.rotation import inverse_rotation_matrix, matmul_rows, rotation_arrays, rotation_matrix

TINY_RMS = 1e-12
"""Keeps the division defined for a zero vector, whose stored norm is zero anyway."""


def unit_rms(x: mx.array) -> tuple[mx.array, mx.array]:
    """Vectors divided by their root mean square, and that root mean square.

    Args:
        x: ``[..., D]``.

    Returns:
        ``[..., D]`` fp32 and ``[..., 1]`` fp32.
    """
    x = x.astype(mx.float32)
    rms = mx.sqrt(mx.mean(mx.square(x), axis=-1, keepdims=True))
    return x * (1 / mx.maximum(rms, TINY_RMS)), rms


@QUANTIZERS.register("turboquant_mse")
@dataclass(frozen=True)
class TurboQuantMSE(Quantizer):
    """Rotate, normalise, code each coordinate with the Lloyd–Max codebook of the sphere.

    Kept per token and head: ``code_bits`` per coordinate and one fp16 RMS norm, so ``code_bits + 16/head_dim`` bits
    per value where the codes fill whole words. Leaves a fraction D(code_bits) of the energy as error (.361, .116, .034,
    .0093 for 1–4 bits at head_dim 128).

    Source: TurboQuant (arXiv 2504.19874), algorithm 1, with a randomised Hadamard rotation.

    Args:
        code_bits: width of a code, 1..8.
        seed: of the rotation.
    """

    name: ClassVar[str] = "turboquant_mse"
    code_bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_code_bits(self.code_bits)

    def codebook(self, head_dim: int) -> Codebook:
        """The Lloyd–Max codebook of one rotated coordinate."""
        return sphere_codebook(head_dim, 1 << self.code_bits)

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed codes and one fp16 RMS norm per token."""
        words = packed_words(head_dim, self.code_bits)
        return ArraySpec("codes", words, mx.uint32), ArraySpec("norms", 1, mx.float16)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        head_dim = x.shape[-1]
        unit, rms = unit_rms(x)
        codes = nearest_codes(matmul_rows(unit, rotation_matrix(head_dim, self.seed)), self.codebook(head_dim))
        return pack_codes(codes, self.code_bits), rms.astype(mx.float16)

    def _decode(self, codes: Codes) -> mx.array:
        words, norms = codes.arrays
        head_dim = codes.head_dim
        rotated = decode_words(words, self.codebook(head_dim), self.code_bits, head_dim)
        unit = matmul_rows(rotated, inverse_rotation_matrix(head_dim, self.seed))
        return unit * norms.astype(mx.float32)

    def static_arrays(self, head_dim: int) -> Arrays:
        """The codebook's tables and the rotation."""
        tables = codebook_arrays(self.codebook(head_dim), self.code_bits, head_dim)
        return *tables, *rotation_arrays(head_dim, self.seed)

    def expected_distortion(self, head_dim: int) -> float:
        """That of the codebook, whatever the input."""
        return self.codebook(head_dim).distortion


@METHODS.register("turboquant_mse")
@dataclass(frozen=True)
class TurboQuantMSEOptions(MethodOptions):
    """Options of :class:`TurboQuantMSE`."""

    summary: ClassVar[str] = "random rotation, Lloyd-Max codes, one fp16 norm per vector (arXiv 2504.19874)"
    code_bits: int = 4

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantMSE(self.code_bits if code_bits is None else code_bits, seed)
