"""TurboQuant, the variant with unbiased inner products, and its adaptive form."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import mlx.core as mx
import numpy as np

from veloxquant_kernels.codebook import centroids_of, codebook_arrays, decode_words, nearest_codes
from veloxquant_kernels.packing import MAX_CODE_BITS, check_code_bits, pack_codes, packed_words
from veloxquant_kernels.turboquant import TINY_RMS, unit_rms
from veloxquant_mlx.methods import METHODS, MethodOptions, Role, WidthOptions
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, EncodingObserver, Quantizer
from veloxquant_mlx.quantizers.lloyd_max import Codebook, sign_codebook, sphere_codebook
from veloxquant_mlx.quantizers.mixed import MixedQuantizer
from veloxquant_mlx.transforms.rotation import matmul_rows, rotation

UNBIASED = math.sqrt(math.pi / 2)
"""1 / E|g| of a standard normal: makes the sign sketch unbiased."""


@functools.cache
def sketch_matrix(head_dim: int, seed: int) -> mx.array:
    """The Gaussian matrix Sᵀ of the sign sketch, ``[head_dim, head_dim]`` fp32."""
    rng = np.random.default_rng([seed, head_dim, 1])
    return mx.array(rng.standard_normal((head_dim, head_dim)).astype(np.float32))


@functools.cache
def _unsketch_matrix(head_dim: int, seed: int) -> mx.array:
    """sqrt(π/2)/d · S · R⁻¹: from signs to the residual in the input's basis."""
    product = sketch_matrix(head_dim, seed).T @ rotation(head_dim, seed).inverse
    matrix = mx.contiguous(product * (UNBIASED / head_dim))
    mx.eval(matrix)  # all threads share it
    return matrix


@functools.cache
def sketch_distortion(head_dim: int, seed: int) -> float:
    """Energy of the sketch's error over that of a residual of uniform direction, for this very matrix.

    With rows s_i, E sign⟨s_i, r⟩ sign⟨s_j, r⟩ = 2/π · arcsin(cos(s_i, s_j)) and E|⟨s_i, r⟩| = ‖s_i‖ · E|r_1|.
    """
    rows = np.array(sketch_matrix(head_dim, seed)).T.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    gram = rows @ rows.T
    agreement = 2 / math.pi * np.arcsin(np.clip(gram / np.outer(lengths, lengths), -1, 1))
    factor = UNBIASED / head_dim
    mean_abs = math.exp(math.lgamma(head_dim / 2) - math.lgamma((head_dim + 1) / 2)) / math.sqrt(math.pi)
    energy = factor**2 * float(np.sum(gram * agreement))
    return energy - 2 * factor * float(lengths.sum()) * mean_abs + 1


@QUANTIZERS.register("turboquant_prod")
@dataclass(frozen=True)
class TurboQuantProd(Quantizer):
    """TurboQuant MSE at ``code_bits - 1``, plus one sign per coordinate of a Gaussian sketch of the residual.

    Inner products with the decoded vector are unbiased, with variance π/2 · D(code_bits - 1) · ‖x‖²‖y‖²/d (1.571,
    .571, .185, .054 over d for 1–4 bits). The squared error is as large, about 4.9 times that of
    TurboQuant MSE at the same width, and softmax attention usually feels the variance, not the bias. Kept per token
    and head: ``code_bits`` per coordinate and two fp16 norms, ``code_bits + 32/head_dim`` bits per value.

    Source: TurboQuant (arXiv 2504.19874), algorithm 2; QJL (arXiv 2406.03482).

    Args:
        code_bits: width, 1..8; at 1 the whole vector is sketched.
        seed: of the rotation and the sketch.
    """

    name: ClassVar[str] = "turboquant_prod"
    code_bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_code_bits(self.code_bits)

    def _codebook(self, head_dim: int) -> Codebook | None:
        return sphere_codebook(head_dim, 1 << (self.code_bits - 1)) if self.code_bits > 1 else None

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed codes (none at one bit), packed signs, RMS norm, RMS of the normalised residual."""
        signs = ArraySpec("signs", packed_words(head_dim, 1), mx.uint32)
        norms = ArraySpec("norms", 1, mx.float16), ArraySpec("residual_norms", 1, mx.float16)
        if self.code_bits == 1:
            return signs, *norms
        return ArraySpec("codes", packed_words(head_dim, self.code_bits - 1), mx.uint32), signs, *norms

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        head_dim = x.shape[-1]
        unit, rms = unit_rms(x)
        residual = rotation(head_dim, self.seed).apply(unit)
        arrays: list[mx.array] = []
        codebook = self._codebook(head_dim)
        if codebook is not None:
            codes = nearest_codes(residual, codebook)
            arrays.append(pack_codes(codes, self.code_bits - 1))
            residual = residual - centroids_of(codes, codebook)
        residual_rms = mx.sqrt(mx.mean(mx.square(residual), axis=-1, keepdims=True))
        signs = matmul_rows(residual, sketch_matrix(head_dim, self.seed)) > 0
        return *arrays, pack_codes(signs, 1), rms.astype(mx.float16), residual_rms.astype(mx.float16)

    def _decode(self, codes: Codes) -> mx.array:
        *words, signs, norms, residual_norms = codes.arrays
        head_dim = codes.head_dim
        # ‖r‖ = rms(r)·sqrt(d), and the sketch's factor is sqrt(π/2)/d
        sketch = decode_words(signs, sign_codebook(), 1, head_dim)
        scale = residual_norms.astype(mx.float32) * math.sqrt(head_dim)
        unit = matmul_rows(sketch, _unsketch_matrix(head_dim, self.seed)) * scale
        codebook = self._codebook(head_dim)
        if codebook is not None:
            rotated = decode_words(words[0], codebook, self.code_bits - 1, head_dim)
            unit = unit + rotation(head_dim, self.seed).undo(rotated)
        return unit * norms.astype(mx.float32)

    def static_arrays(self, head_dim: int) -> Arrays:
        """The codebooks' tables, the rotation and the sketch, both ways."""
        codebook = self._codebook(head_dim)
        sketch = sketch_matrix(head_dim, self.seed), _unsketch_matrix(head_dim, self.seed)
        tables = *rotation(head_dim, self.seed).arrays, *sketch, *codebook_arrays(sign_codebook(), 1, head_dim)
        return tables if codebook is None else (*codebook_arrays(codebook, self.code_bits - 1, head_dim), *tables)

    def expected_distortion(self, head_dim: int) -> float:
        """That of this seed's sketch; (π/2 - 1/d) · D(code_bits - 1) on average over seeds."""
        codebook = self._codebook(head_dim)
        return sketch_distortion(head_dim, self.seed) * (1.0 if codebook is None else codebook.distortion)


def cosine_similarity(x: mx.array, decoded: mx.array) -> mx.array:
    """Cosine between vectors and their decoded form, ``[..., D]`` to ``[...]``; 1 where both are zero."""
    x, decoded = x.astype(mx.float32), decoded.astype(mx.float32)
    lengths = mx.linalg.norm(x, axis=-1) * mx.linalg.norm(decoded, axis=-1)
    both_zero = mx.logical_and(mx.max(mx.abs(x), axis=-1) == 0, mx.max(mx.abs(decoded), axis=-1) == 0)
    return mx.where(both_zero, 1.0, mx.sum(x * decoded, axis=-1) / mx.maximum(lengths, TINY_RMS))


@QUANTIZERS.register("turboquant_prod_adaptive")
@dataclass(frozen=True)
class TurboQuantProdAdaptive(MixedQuantizer):
    """TurboQuant Prod whose width each block of tokens chooses by the cosine similarity it observes.

    A block starts at ``base_bits`` and takes one bit more while its mean cosine similarity is below
    ``1 - distortion_threshold``, up to ``max_bits``. On Gaussian vectors the cosine is 1/sqrt(1 + π/2·D(b - 1)): .537,
    .798, .919, .974 at 1–4 bits; after rotation other data hardly differ. So a threshold of .05 climbs to 4 bits
    and .25 stays at 2. Kept besides the codes: one byte per block that names its width.

    Args:
        base_bits: width that every block has at least.
        max_bits: width that no block exceeds.
        distortion_threshold: 1 minus the cosine similarity that is enough, within (0, 1).
        observer: is told of what :meth:`encode` encodes; a cache tells its own observer.
        block_size: tokens per block.
        seed: of rotation and sketch.

    Raises:
        ValueError: a width outside 1..8, ``max_bits`` below ``base_bits``, a threshold outside (0, 1).
    """

    name: ClassVar[str] = "turboquant_prod_adaptive"
    base_bits: int = 2
    max_bits: int = 4
    distortion_threshold: float = 0.05
    observer: EncodingObserver | None = field(default=None, compare=False)
    block_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_code_bits(self.base_bits, name="base_bits")
        check_code_bits(self.max_bits, name="max_bits")
        if self.max_bits < self.base_bits:
            raise ValueError(f"max_bits must be at least base_bits={self.base_bits}, got {self.max_bits}")
        if not 0 < self.distortion_threshold < 1:
            raise ValueError(f"distortion_threshold must be within (0, 1), got {self.distortion_threshold}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    @property
    def block_tokens(self) -> int:
        """Tokens that share a width."""
        return self.block_size

    @property
    def variants(self) -> tuple[Quantizer, ...]:
        """TurboQuant Prod at every width from ``base_bits`` to ``max_bits``."""
        return tuple(TurboQuantProd(bits, self.seed) for bits in self._widths)

    @property
    def _widths(self) -> range:
        return range(self.base_bits, self.max_bits + 1)

    def choose(self, x: mx.array) -> np.ndarray:
        """The variant of each block of ``[B, H, T, D]``, as an index; the batch and the heads decide together."""
        n_blocks = x.shape[2] // self.block_size
        chosen = np.full(n_blocks, len(self.variants) - 1, dtype=np.uint8)
        open_blocks = np.arange(n_blocks)
        for index, variant in enumerate(self.variants[:-1]):
            part = self.take_blocks(x, open_blocks)
            cosine = cosine_similarity(part, variant.decode(variant.encode(part), mx.float32))
            means = np.array(cosine.reshape(*cosine.shape[:2], -1, self.block_size).mean(axis=(0, 1, 3)))
            enough = means >= 1 - self.distortion_threshold
            chosen[open_blocks[enough]] = index
            open_blocks = open_blocks[~enough]
            if not len(open_blocks):
                break
        return chosen

    def expected_distortion(self, head_dim: int) -> float:
        """That of the first width whose cosine on Gaussian vectors, 1/sqrt(1 + D), is enough, else of the widest."""
        distortions = [TurboQuantProd(bits, self.seed).expected_distortion(head_dim) for bits in self._widths]
        enough = [d for d in distortions if 1 / math.sqrt(1 + d) >= 1 - self.distortion_threshold]
        return max(enough, default=distortions[-1])

    def encode(self, x: mx.array, static: Arrays | None = None) -> Codes:
        """Encode by itself, outside of a cache, and tell the observer."""
        codes = super().encode(x, static)
        if self.observer is not None:
            choices, decoded = np.array(codes.arrays[0]).ravel(), self.decode(codes, mx.float32)
            for index in np.unique(choices):
                blocks = np.flatnonzero(choices == index)
                pair = self.take_blocks(x, blocks), self.take_blocks(decoded, blocks)
                self.observer.observe(*pair, quantizer=self.variants[index])
        return codes


@METHODS.register("turboquant_prod")
@dataclass(frozen=True)
class TurboQuantProdOptions(WidthOptions):
    """Options of :class:`TurboQuantProd`."""

    summary: ClassVar[str] = (
        "TurboQuant MSE at one bit less and a sign sketch of the residual: unbiased products (arXiv 2504.19874)"
    )

    def coded(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """The same code for keys and values."""
        return TurboQuantProd(code_bits, seed)


@METHODS.register("turboquant_prod_adaptive")
@dataclass(frozen=True)
class TurboQuantProdAdaptiveOptions(MethodOptions):
    """Options of :class:`TurboQuantProdAdaptive`; ``value_bits`` gives values a fixed width."""

    summary: ClassVar[str] = (
        "TurboQuant Prod, every block of tokens at the least width whose cosine is enough; a target is the largest"
    )
    targets: ClassVar[tuple[float, ...]] = tuple(float(bits) for bits in range(MAX_CODE_BITS, 1, -1))
    target_field: ClassVar[str | None] = "max_bits"
    allocatable: ClassVar[bool] = False
    base_bits: int = 2
    max_bits: int = 4
    distortion_threshold: float = 0.05
    block_size: int = 32

    def quantizer(self, role: Role, code_bits: int | None, seed: int) -> Quantizer:
        """Adaptive, or TurboQuant Prod at a width that is named."""
        if code_bits is not None:
            return TurboQuantProd(code_bits, seed)
        return TurboQuantProdAdaptive(
            base_bits=self.base_bits,
            max_bits=self.max_bits,
            distortion_threshold=self.distortion_threshold,
            block_size=self.block_size,
            seed=seed,
        )
