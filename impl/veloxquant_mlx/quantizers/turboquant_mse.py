"""TurboQuant, the variant that minimises mean squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxquant_kernels.codebook import codebook_arrays
from veloxquant_kernels.packing import check_code_bits, packed_words
from veloxquant_kernels.turboquant import (
    kernel_decodes,
    rotate_quantize_pack,
    unpack_dequantize_unrotate,
    unpack_unrotate,
)
from veloxquant_mlx.methods import METHODS, Role, WidthOptions
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer
from veloxquant_mlx.quantizers.lloyd_max import Codebook, sphere_codebook
from veloxquant_mlx.transforms.rotation import rotation


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
        return rotate_quantize_pack(x, rotation(head_dim, self.seed), self.codebook(head_dim), self.code_bits)

    def _decode(self, codes: Codes) -> mx.array:
        words, norms = codes.arrays
        turn, codebook = rotation(codes.head_dim, self.seed), self.codebook(codes.head_dim)
        if kernel_decodes(words, turn):  # the same in one pass over the words
            return unpack_dequantize_unrotate(words, norms, turn, codebook, self.code_bits, mx.float32)
        unit = unpack_unrotate(words, turn, codebook, self.code_bits)
        return unit * norms.astype(mx.float32)

    def static_arrays(self, head_dim: int) -> Arrays:
        """The codebook's tables and the rotation."""
        tables = codebook_arrays(self.codebook(head_dim), self.code_bits, head_dim)
        return *tables, *rotation(head_dim, self.seed).arrays

    def expected_distortion(self, head_dim: int) -> float:
        """That of the codebook, whatever the input."""
        return self.codebook(head_dim).distortion


@METHODS.register("turboquant_mse")
@dataclass(frozen=True)
class TurboQuantMSEOptions(WidthOptions):
    """Options of :class:`TurboQuantMSE`."""

    summary: ClassVar[str] = "random rotation, Lloyd-Max codes, one fp16 norm per vector (arXiv 2504.19874)"

    def coded(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantMSE(code_bits, seed)
