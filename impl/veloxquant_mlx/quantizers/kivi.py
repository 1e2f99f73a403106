"""KIVI: keys in groups of tokens of one channel, values in groups of channels of one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxquant_kernels.affine import affine_unpack_dequantize, kivi_quantize_pack
from veloxquant_kernels.packing import packed_words
from veloxquant_mlx.methods import METHODS, Role, WidthOptions
from veloxquant_mlx.quantizers.affine import Affine, GroupQuantizer, min_max_distortion
from veloxquant_mlx.quantizers.base import QUANTIZERS, Arrays, ArraySpec, Codes, Quantizer


@QUANTIZERS.register("kivi_keys")
@dataclass(frozen=True)
class PerChannelAffine(GroupQuantizer):
    """Groups of neighbouring tokens of one channel: keys have channels of very different size.

    ``group_size`` tokens are encoded together; a cache keeps fewer in fp16 until the group is full. Costs
    ``code_bits + 32/group_size`` bits per value.

    Source: KIVI (arXiv 2402.02750), section 3.

    Args:
        code_bits: width of a code, 1..8.
        group_size: tokens per group.
    """

    name: ClassVar[str] = "kivi_keys"
    code_bits: int = 2

    @property
    def block_tokens(self) -> int:
        """Tokens per group."""
        return self.group_size

    def layout(self, head_dim: int) -> tuple[ArraySpec, ...]:
        """Packed codes (token by token), scales and zero points of the channels."""
        return (
            ArraySpec("codes", self.group_size * packed_words(head_dim, self.code_bits), mx.uint32),
            ArraySpec("scales", head_dim, mx.float16),
            ArraySpec("zeros", head_dim, mx.float16),
        )

    def expected_distortion(self, head_dim: int) -> float:
        """On channels that are Gaussian along the tokens."""
        return min_max_distortion(self.group_size, self.code_bits)

    def _encode(self, x: mx.array, static: Arrays) -> Arrays:
        words, scales, zeros = kivi_quantize_pack(x, self.code_bits, self.group_size)
        return words.reshape(*scales.shape[:-1], self.group_size * words.shape[-1]), scales, zeros

    def _decode(self, codes: Codes) -> mx.array:
        words, scales, zeros = codes.arrays
        n_batch, n_heads, n_blocks, n_words = words.shape
        rows = words.reshape(n_batch, n_heads, n_blocks * self.group_size, n_words // self.group_size)
        return affine_unpack_dequantize(
            rows, scales, zeros, self.code_bits, codes.head_dim, self.group_size, mx.float32, per_channel=True
        )


@METHODS.register("kivi")
@dataclass(frozen=True)
class KIVIOptions(WidthOptions):
    """KIVI (arXiv 2402.02750): keys in groups of tokens per channel, values in groups of channels per token.

    The last 128 tokens stay in fp16 unless ``window`` says otherwise.
    """

    summary: ClassVar[str] = "keys per channel, values per token, the last 128 tokens in fp16 (arXiv 2402.02750)"
    default_window: ClassVar[int] = 128
    code_bits: int = 2
    group_size: int = 32

    def coded(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """Per channel for keys, per token for values."""
        return PerChannelAffine(code_bits, self.group_size) if role == "keys" else Affine(code_bits, self.group_size)

    def outlier_quantizer(self, role: Role, code_bits: int, seed: int) -> Quantizer:
        """Per token on both sides: a flagged token has no neighbours."""
        return Affine(code_bits, self.group_size)
