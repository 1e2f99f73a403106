"""TurboQuant without a norm per token: a mean and a scale per head, calibrated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxquant_kernels.codebook import codebook_arrays, decode_words, nearest_codes
from veloxquant_kernels.packing import MAX_CODE_BITS, check_code_bits, pack_codes, packed_words
from veloxquant_kernels.turboquant import TINY_RMS
from veloxquant_mlx.methods import METHODS, Role, WidthOptions
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer
from veloxquant_mlx.quantizers.lloyd_max import Codebook, gaussian_codebook
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import rotation


@QUANTIZERS.register("turboquant_static")
@dataclass(frozen=True)
class TurboQuantStatic(Quantizer):
    """Subtract the head's mean vector, rotate, divide by the head's scale, code with the Gaussian codebook.

    Mean and scale come from the head's first ``calibration`` tokens (which a cache keeps in fp16 until they are
    complete) and stay: nothing but codes is kept per token, exactly ``code_bits`` bits per value where they fill
    whole words. Width 0 keeps nothing and decodes to the mean. On Gaussian input the distortion is that of
    Lloyd–Max; tokens whose norms vary pay for the missing norm.

    Source: TurboQuant (arXiv 2504.19874), algorithm 1; offline scales as in KVQuant (arXiv 2401.18079).

    Args:
        code_bits: width of a code, 0..8.
        calibration: tokens that decide mean and scale.
        seed: of the rotation.
    """

    name: ClassVar[str] = "turboquant_static"
    code_bits: int = 1
    calibration: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.code_bits != 0:
            check_code_bits(self.code_bits)
        if isinstance(self.calibration, bool) or not isinstance(self.calibration, int) or self.calibration < 2:
            raise ValueError(f"calibration must be an int of at least 2, got {self.calibration!r}")

    @property
    def _codebook(self) -> Codebook:
        return gaussian_codebook(1 << self.code_bits)

    @property
    def calibration_tokens(self) -> int:
        """Tokens that decide mean and scale."""
        return self.calibration

    def calibrate(self, x: mx.array) -> Arrays:
        """Mean ``[B, H, 1, D]`` fp16 and scale ``[B, H, 1, 1]`` fp16 of vectors ``[B, H, T, D]``."""
        x = x.astype(mx.float32)
        mean = mx.mean(x, axis=2, keepdims=True).astype(mx.float16)
        spread = mx.sqrt(mx.mean(mx.square(x - mean.astype(mx.float32)), axis=(2, 3), keepdims=True))
        # T - 1: the mean was fitted to the same tokens
        return mean, (spread * (x.shape[2] / max(1, x.shape[2] - 1)) ** 0.5).astype(mx.float16)

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed codes alone; nothing at width 0."""
        if self.code_bits == 0:
            return ()
        return (ArraySpec("codes", packed_words(head_dim, self.code_bits), mx.uint32),)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        if self.code_bits == 0:
            return ()
        mean, scale = (array.astype(mx.float32) for array in static)
        unit = (x.astype(mx.float32) - mean) * (1 / mx.maximum(scale, TINY_RMS))
        codes = nearest_codes(rotation(x.shape[-1], self.seed).apply(unit), self._codebook)
        return (pack_codes(codes, self.code_bits),)

    def _decode(self, codes: Codes) -> mx.array:
        mean, scale = (array.astype(mx.float32) for array in codes.static)
        if self.code_bits == 0:
            n_batch, n_heads, _, head_dim = mean.shape
            return mx.broadcast_to(mean, (n_batch, n_heads, codes.n_tokens, head_dim))
        rotated = decode_words(codes.arrays[0], self._codebook, self.code_bits, codes.head_dim)
        return rotation(codes.head_dim, self.seed).undo(rotated) * scale + mean

    def static_arrays(self, head_dim: int) -> Arrays:
        """The codebook's tables and the rotation."""
        if self.code_bits == 0:
            return ()
        tables = codebook_arrays(self._codebook, self.code_bits, head_dim)
        return *tables, *rotation(head_dim, self.seed).arrays

    def expected_distortion(self, head_dim: int) -> float:
        """That of the Gaussian codebook, for calibration on many tokens; 1 at width 0."""
        return 1.0 if self.code_bits == 0 else self._codebook.distortion


@METHODS.register("turboquant_static")
@dataclass(frozen=True)
class TurboQuantStaticOptions(WidthOptions):
    """Options of :class:`TurboQuantStatic`; width 0 keeps nothing but the mean."""

    summary: ClassVar[str] = "TurboQuant codes under a mean and scale per head from the first tokens, no norm per token"
    widths: ClassVar[range] = range(MAX_CODE_BITS + 1)
    code_bits: int = 1
    calibration: int = 64

    def coded(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantStatic(code_bits, self.calibration, seed)

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """With a norm per token: a flagged token is far from the calibrated scale."""
        return TurboQuantMSE(code_bits, seed)
