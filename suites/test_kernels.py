"""Timings of the cache's own work, by pytest-benchmark (once, untimed, without ``--benchmark``)."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from veloxquant_mlx.cache.base import KVCacheConfig

HEADS, TOKENS, HEAD_DIM = 3, 2048, 64


@pytest.mark.parametrize("code_bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("work", ["encode", "decode"])
def test_turboquant_mse(benchmark: Callable[..., Any], code_bits: int, work: str) -> None:
    """One layer's 2048 tokens, encoded and decoded, stay within the codebook's distortion."""
    quantizer = KVCacheConfig(method="turboquant_mse", code_bits=code_bits).quantizer("keys", code_bits)
    x = mx.array(np.random.default_rng(0).standard_normal((1, HEADS, TOKENS, HEAD_DIM)).astype(np.float16))
    codes = quantizer.encode(x)
    mx.eval(x, codes.arrays)

    def encode() -> None:
        mx.eval(quantizer.encode(x).arrays)

    def decode() -> mx.array:
        decoded = quantizer.decode(codes, mx.float32)
        mx.eval(decoded)
        return decoded

    benchmark(encode if work == "encode" else decode)
    error = mx.mean(mx.square(decode() - x.astype(mx.float32))) / mx.mean(mx.square(x.astype(mx.float32)))
    expected = quantizer.expected_distortion(HEAD_DIM)
    # 393k samples: the mean error's own deviation is below 1%
    assert float(error) == pytest.approx(expected, rel=0.02)
