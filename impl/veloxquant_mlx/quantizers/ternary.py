"""Three levels, five to a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxquant_kernels.codebook import decode_trits, nearest_codes, trit_arrays
from veloxquant_kernels.packing import pack_trits, trit_bytes
from veloxquant_kernels.turboquant import unit_rms
from veloxquant_mlx.methods import METHODS, MethodOptions, Role
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer
from veloxquant_mlx.quantizers.lloyd_max import Codebook, sphere_codebook
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import rotation


@QUANTIZERS.register("ternary")
@dataclass(frozen=True)
class Ternary(Quantizer):
    """TurboQuant MSE with the three-level Lloyd–Max codebook: distortion .190 on Gaussian input.

    Kept per token and head: 1.6 bits per coordinate (whole bytes) and one fp16 RMS norm, 1.875 bits per value at
    head_dim 64.

    Source: Max 1960 for the levels; TurboQuant (arXiv 2504.19874), algorithm 1, for the rotation.

    Args:
        seed: of the rotation.
    """

    name: ClassVar[str] = "ternary"
    seed: int = 0

    def _codebook(self, head_dim: int) -> Codebook:
        return sphere_codebook(head_dim, 3)

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed trits and one fp16 RMS norm per token."""
        return ArraySpec("trits", trit_bytes(head_dim), mx.uint8), ArraySpec("norms", 1, mx.float16)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        head_dim = x.shape[-1]
        unit, rms = unit_rms(x)
        trits = nearest_codes(rotation(head_dim, self.seed).apply(unit), self._codebook(head_dim))
        return pack_trits(trits), rms.astype(mx.float16)

    def _decode(self, codes: Codes) -> mx.array:
        data, norms = codes.arrays
        rotated = decode_trits(data, self._codebook(codes.head_dim), codes.head_dim)
        return rotation(codes.head_dim, self.seed).undo(rotated) * norms.astype(mx.float32)

    def static_arrays(self, head_dim: int) -> Arrays:
        """The table of bytes to five centroids, the boundaries, and the rotation."""
        return *trit_arrays(self._codebook(head_dim)), *rotation(head_dim, self.seed).arrays

    def expected_distortion(self, head_dim: int) -> float:
        """That of the codebook, whatever the input."""
        return self._codebook(head_dim).distortion


@METHODS.register("ternary")
@dataclass(frozen=True)
class TernaryOptions(MethodOptions):
    """:class:`Ternary`, which has one width; ``value_bits`` gives values TurboQuant MSE."""

    summary: ClassVar[str] = "three levels, five to a byte, one fp16 norm per vector"
    targets: ClassVar[tuple[float, ...]] = (1.6,)
    target_field: ClassVar[str | None] = None
    allocatable: ClassVar[bool] = False

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """Ternary, or TurboQuant MSE at a width that is named."""
        return Ternary(seed) if code_bits is None else TurboQuantMSE(code_bits, seed)
