"""Kernel traffic, and timings of the cache's own work by pytest-benchmark (once, untimed, without ``--benchmark``).

Traffic is counted by the emulator on every machine. Timings are of what runs natively: plain MLX everywhere, the fused
kernel on Metal.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from veloxbench.records.record import Record
from veloxquant_kernels.kernel import why_no_metal
from veloxquant_mlx.cache.base import KVCacheConfig, PackedKVCache
from veloxquant_mlx.cache.fused import FusedKVCache

SUITE = "kernels"
HEADS, TOKENS, HEAD_DIM = 3, 2048, 64
GROUP = 3
OTHER_PERCENT_LIMIT = 10.0
"""Of everything but packed keys and values, at 4096 tokens and widths of 2 and more."""


def test_packed_bytes_are_read_once(record: Record) -> None:
    """Each packed byte is read exactly once; at 4096 tokens all other traffic is within a tenth."""
    assert record.metrics["packed_reads"].value == 1.0
    if record.subject.settings["tokens"] == 4096:
        assert record.metrics["other_percent"].value <= OTHER_PERCENT_LIMIT


@pytest.mark.parametrize("code_bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("path", ["plain", "fused"])
def test_decode_attention(benchmark: Callable[..., Any], code_bits: int, path: str) -> None:
    """One layer's decode step over 2048 packed tokens gives what attention over the decoded cache gives."""
    if path == "fused" and why_no_metal() is not None:
        pytest.skip("the fused kernel runs natively on Metal only")
    config = KVCacheConfig(method="turboquant_mse", code_bits=code_bits)
    cache = PackedKVCache(config.layer_spec(0, None, None, None))
    rng = np.random.default_rng(0)

    def normal(heads: int, tokens: int) -> mx.array:
        return mx.array(rng.standard_normal((1, heads, tokens, HEAD_DIM)).astype(np.float32))

    cache.store(normal(HEADS, TOKENS), normal(HEADS, TOKENS))
    queries, scale = normal(HEADS * GROUP, 1), HEAD_DIM**-0.5
    fused = FusedKVCache.from_packed(cache, "metal")
    mx.eval(queries, [held.array for held in cache.held_arrays()])

    def step() -> mx.array:
        if path == "fused":
            out = fused.attend(queries, scale, None)
        else:
            out = mx.fast.scaled_dot_product_attention(queries, *cache.fetch(TOKENS, mx.float32), scale=scale)
        mx.eval(out)
        return out

    benchmark(step)
    out = step()
    with mx.stream(mx.cpu):  # a GPU may multiply fp32 matrices in TF32, which only the kernel itself does not
        expected = FusedKVCache.from_packed(cache, "reference").attend(queries, scale, None)
        out = out if path == "fused" else step()
    # outputs are averages of 2048 values of size 1; fp32 rounds each sum to about 1e-6
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=2e-5)


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
