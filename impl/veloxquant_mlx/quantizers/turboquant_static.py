"""TurboQuant without a norm per token: a mean and a scale per head, calibrated once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxquant_kernels.codebook import codebook_arrays, decode_words, nearest_codes
from veloxquant_kernels.packing import MAX_CODE_BITS, check_code_bits, pack_codes, packed_words
from veloxquant_kernels.turboquant import TINY_RMS
from veloxquant_mlx.methods import METHODS, Role, WidthOptions
from veloxquant_mlx.quantizers.base import (
    LARGEST_HALF,
    QUANTIZERS,
    Arrays,
    ArraySpec,
    Codes,
    Quantizer,
    half,
    saturated,
)
from veloxquant_mlx.quantizers.lloyd_max import Codebook, gaussian_codebook
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import rotation

Floats = NDArray[np.float32]

MISFIT: Final = 4.0
"""Factor between a token's RMS and the scale beyond which the scale does not fit: keys and values of real text stay
within it, but for single small values."""

DRIFT: Final = 2.0
"""The factor for tokens in a row: a step twice too large leaves four times the error. Real text passes it for 9 tokens
in a row at most (SmolLM2-135M, all heads, 1408 tokens)."""

IN_A_ROW: Final = 16
"""Tokens in a row beyond ``DRIFT`` that make the scale wrong: single small ones (values of attention sinks) are
ordinary."""

TINY: Final = 64.0
"""A token smaller than the scale's part by this counts ``IN_A_ROW / 4`` times: real text has none below a 12th."""


def finite_tokens(x: mx.array) -> mx.array:
    """Which vectors of ``[..., D]`` are finite throughout, ``[..., 1]``."""
    finite: mx.array = mx.all(mx.isfinite(x), axis=-1, keepdims=True)
    return finite


def _rms(x: mx.array) -> mx.array:
    return mx.sqrt(mx.mean(mx.square(x), axis=-1))


def _in_a_row(counts: NDArray[np.int64], carried: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of ``[..., T]`` since the last token that counts nothing; ``carried`` came before the first."""
    total = np.cumsum(counts, axis=-1)
    return total - np.maximum.accumulate(np.where(counts == 0, total, -carried[..., None]), axis=-1)


@functools.cache
def reserved_words(head_dim: int, code_bits: int, seed: int) -> tuple[mx.array, mx.array]:
    """The packed codes of a token that is not finite, drawn by ``seed``, and what stands for them in one that is."""
    codes = np.random.default_rng([seed, head_dim, 2]).integers(0, 1 << code_bits, (2, head_dim), dtype=np.uint8)
    codes[1, 1:] = codes[0, 1:]
    codes[1, 0] = codes[0, 0] ^ 1
    reserved, beside = (pack_codes(mx.array(row), code_bits, backend="reference") for row in codes)
    mx.eval(reserved, beside)  # what is returned itself: a lazy array belongs to the thread that made it
    return reserved, beside


@QUANTIZERS.register("turboquant_static")
@dataclass(frozen=True)
class TurboQuantStatic(Quantizer):
    """Subtract the head's mean vector, rotate, divide by the head's scale, code with the Gaussian codebook.

    Mean and scale come from the head's first ``calibration`` tokens (which a cache keeps in fp16 until they are
    complete): nothing but codes is kept per token, exactly ``code_bits`` bits per value where they fill whole words.
    Width 0 keeps nothing and decodes to the mean. On Gaussian input the distortion is that of Lloyd–Max; tokens whose
    norms vary pay for the missing norm.

    First tokens may be unlike all that follow (one token repeated, padding). So a cache calls :meth:`follow`: from a
    token that is more than ``MISFIT`` times the scale, or from the last of ``IN_A_ROW`` tokens that are all more than
    ``DRIFT`` times larger or smaller, another scale holds (16 bits a head, 32 a stretch), and the mean is left out
    where it misleads.
    Ordinary text seldom needs one (ten stretches in SmolLM2-135M's thirty layers in 2,048 tokens); what does not fit by
    less loses accuracy, as documented, and no more.

    One pattern of codes is reserved for tokens that are not finite: they decode to NaN, and calibrate nothing.

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

    def slotted(self, n_static: int) -> tuple[int, ...]:
        """The scale."""
        return (1,)

    def calibrate(self, x: mx.array) -> Arrays:
        """Mean ``[B, H, 1, D]``, scale and tokens in a row ``[B, H, 1, 1]`` of vectors ``[B, H, T, D]``, all fp16.

        A negative scale is one beside which the mean is left out. Tokens that are not finite do not count.
        """
        x = saturated(x).astype(mx.float32)
        kept = finite_tokens(x)
        x = mx.where(kept, x, 0)
        count = mx.maximum(mx.sum(kept.astype(mx.float32), axis=2, keepdims=True), 1)
        mean = half(mx.sum(x, axis=2, keepdims=True) / count)
        squares = mx.where(kept, mx.square(x - mean.astype(mx.float32)), 0)
        variance = mx.sum(squares, axis=(2, 3), keepdims=True) / (x.shape[3] * mx.maximum(count - 1, 1))
        # count - 1: the mean was fitted to the same tokens
        scale = half(mx.sqrt(variance))
        return mean, scale, mx.zeros_like(scale)

    def follow(self, x: mx.array, static: Arrays) -> tuple[Arrays, list[int]]:
        """The calibration with another scale from every token on that the one before does not fit.

        Whatever the chunks in which tokens arrive, the same tokens open the same slots. Evaluates ``x``.
        """
        mean, scales, *rest = static
        x = saturated(x).astype(mx.float32)
        x = mx.where(finite_tokens(x), x, mx.nan)
        whole, centred = np.array(mx.stack([_rms(x), _rms(x - mean.astype(mx.float32))]))
        slots = np.moveaxis(np.array(scales[..., 0], dtype=np.float32), 2, 0)
        scale = before = slots[0]
        for slot in slots[1:]:
            before, scale = np.where(slot != scale, scale, before), slot
        row = np.array(rest[0][..., 0, 0], dtype=np.int64) if rest else np.zeros(scale.shape, dtype=np.int64)
        starts: list[int] = []
        added: list[mx.array] = []
        at = 0
        while at < x.shape[2]:
            sizes = whole[..., at:], centred[..., at:]
            event, run, back = self._misfits(*sizes, scale[..., None], before[..., None], row)
            tokens = np.flatnonzero(event.any(axis=(0, 1)))
            if not len(tokens):
                row = run[..., -1]
                break
            first = int(tokens[0])
            size, distance = (values[..., first] for values in sizes)
            fitted = np.where(distance <= size, distance, -size)  # NaN where the token is
            fitted = np.clip(fitted, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float32)
            hit = event[..., first]
            row = np.where(hit, 0, run[..., first])
            before, scale = (
                np.where(hit, scale, before),
                np.where(hit, np.where(back[..., first], before, fitted), scale),
            )
            starts.append(at + first)
            added.append(mx.array(scale[..., None, None]).astype(mx.float16))
            at += first + 1
        return (
            mean,
            mx.concatenate([scales, *added], axis=2),
            mx.array(row[..., None, None]).astype(mx.float16),
        ), starts

    def _misfits(
        self, whole: Floats, centred: Floats, scale: Floats, before: Floats, row: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.bool_]]:
        """Per token and head: whether another scale is needed, tokens in a row, whether the scale before fits.

        Tokens in a row count above zero where they are small, below where they are large.
        """
        if self.code_bits == 0:  # decodes to the mean whatever the token, so only NaN needs a slot
            lost, held = np.isnan(whole), np.isnan(scale)
            return lost != held, np.zeros(whole.shape, dtype=np.int64), held & ~lost
        small = whole * MISFIT < np.abs(scale)
        back = small & (np.where(before < 0, whole, centred) <= MISFIT * np.abs(before))
        back &= whole * MISFIT >= np.abs(before)
        distance = np.where(scale < 0, whole, centred)
        below = np.where(whole * TINY < np.abs(scale), IN_A_ROW // 4, whole * DRIFT < np.abs(scale)).astype(np.int64)
        above = ((distance > DRIFT * np.abs(scale)) & (below == 0)).astype(np.int64)
        run = _in_a_row(below, np.maximum(row, 0)) - _in_a_row(above, np.maximum(-row, 0))
        return (distance > MISFIT * np.abs(scale)) | back | (np.abs(run) >= IN_A_ROW), run, back

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed codes alone; nothing at width 0."""
        if self.code_bits == 0:
            return ()
        return (ArraySpec("codes", packed_words(head_dim, self.code_bits), mx.uint32),)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        if self.code_bits == 0:
            return ()
        mean, scale = (array.astype(mx.float32) for array in static[:2])
        kept = finite_tokens(x)
        centred = mx.where(kept, x.astype(mx.float32), 0) - mx.where(scale < 0, 0, mean)
        unit = centred * (1 / mx.maximum(mx.abs(scale), TINY_RMS))
        codes = nearest_codes(rotation(x.shape[-1], self.seed).apply(unit), self._codebook)
        words = pack_codes(codes, self.code_bits)
        reserved, beside = reserved_words(x.shape[-1], self.code_bits, self.seed)
        words = mx.where(mx.all(words == reserved, axis=-1, keepdims=True), beside, words)
        return (mx.where(kept, words, reserved),)

    def _decode(self, codes: Codes) -> mx.array:
        mean, scale = (array.astype(mx.float32) for array in codes.static[:2])
        if self.code_bits == 0:
            n_batch, n_heads, _, head_dim = mean.shape
            return mx.broadcast_to(mx.where(mx.isnan(scale), scale, mean), (n_batch, n_heads, codes.n_tokens, head_dim))
        words = codes.arrays[0]
        rotated = decode_words(words, self._codebook, self.code_bits, codes.head_dim)
        x = rotation(codes.head_dim, self.seed).undo(rotated) * mx.abs(scale) + mx.where(scale < 0, 0, mean)
        lost = mx.all(words == reserved_words(codes.head_dim, self.code_bits, self.seed)[0], axis=-1, keepdims=True)
        return mx.where(lost, mx.nan, x)

    def static_arrays(self, head_dim: int) -> Arrays:
        """The codebook's tables and the rotation."""
        if self.code_bits == 0:
            return ()
        tables = codebook_arrays(self._codebook, self.code_bits, head_dim)
        reserved = reserved_words(head_dim, self.code_bits, self.seed)
        return *tables, *reserved, *rotation(head_dim, self.seed).arrays

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
