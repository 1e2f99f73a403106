"""Caches encode and decode through kernels where a backend runs them, here the emulator, as they do in plain MLX.

All kernels but TurboQuant MSE's agree with plain MLX in every bit. Those rotate by butterflies where plain MLX takes a
product of matrices; docs/kernels.md states what that may move.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fisher_inputs import code, model_of
from impl_inputs import ALL_METHODS, gaussian

from veloxquant_kernels import emulator
from veloxquant_kernels.kernel import shipped_kernels, use_backend
from veloxquant_kernels.packing import unpack_codes
from veloxquant_kernels.verify import ROUNDING, SLACK, same_bits
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache

pytestmark = pytest.mark.usefixtures("compiler")

ROTATED = {"rotate_quantize_pack", "unpack_dequantize_unrotate"}
RUN_BY: dict[str, set[str]] = {
    "turboquant_mse": ROTATED,
    "turboquant_prod": {"pack_codes", "unpack_codes"},
    "turboquant_prod_adaptive": {"pack_codes", "unpack_codes"},
    "turboquant_static": {"pack_codes", "unpack_codes"},
    "affine": {"affine_quantize_pack", "affine_unpack_dequantize"},
    "kivi": {"kivi_quantize_pack", "affine_quantize_pack", "affine_unpack_dequantize"},
    "ternary": {"pack_trits", "unpack_trits"},
    "ratequant": ROTATED,
    "rvq": set(),  # whole bytes: nothing to pack
}
EXACT = sorted(method for method, kernels in RUN_BY.items() if kernels and kernels != ROTATED)
CODED = {"rans_decode"}
"""Of fisher_klt, whose encoder is C++: rANS writes a block from its end, one token after the other."""
FUSED = {"fused_attention", "fused_attention_merge"}
MOVED = 1e-4
"""Share of codes that two orders of the same fp32 sums may put on different sides of a boundary. A rotated value of
unit variance errs by some 3e-7 in either, and at 8 bits about 50 boundaries lie in a unit: 50 x 2 x 3e-7 = 3e-5."""


def config(method: str) -> KVCacheConfig:
    return KVCacheConfig(method=method, sinks=2, **{"window": 3, **ALL_METHODS[method]})


def filled(spec: Any, head_dim: int) -> tuple[PackedKVCache, list[mx.array]]:
    """A cache fed with 50, 1 and 29 tokens, and what it holds."""
    cache = PackedKVCache(spec)
    for seed, n in enumerate((50, 1, 29)):
        x = gaussian((1, 2, n, head_dim), seed)
        x[..., 3] *= 6  # an outlier channel, as keys have
        cache.store(mx.array(x), mx.array(x[..., ::-1].copy()))
    held = [array[:, :, : one.used_slots] for one in cache.held_arrays() for array in [one.array]]
    mx.eval(held)
    return cache, held


@pytest.mark.parametrize("method", sorted(RUN_BY))
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_cache_of_each_method_runs_its_kernels(method: str, head_dim: int) -> None:
    """Encoding and decoding launch the kernels of the method, all of them and no others, with every check passed."""
    spec = config(method).layer_spec(0, 3 if method == "ratequant" else None, None, None)
    with use_backend("emulator"), emulator.session("checked", seed=5) as record:
        cache, _ = filled(spec, head_dim)
        mx.eval(cache.fetch(80, mx.float32))
    assert {launch.kernel for launch in record.launches} == RUN_BY[method]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("head_dim", [48, 64, 80, 128])
def test_bytes_and_values_are_those_of_plain_mlx(method: str, head_dim: int) -> None:
    """What is held and what attention reads agree in every bit."""
    spec = config(method).layer_spec(0, None, None, None)
    plain, held = filled(spec, head_dim)
    with use_backend("emulator"):
        cache, kernels_held = filled(spec, head_dim)
        read = cache.fetch(80, mx.float16)
    assert len(held) == len(kernels_held)
    assert all(same_bits(a, b) for a, b in zip(held, kernels_held, strict=True))
    assert all(same_bits(a, b) for a, b in zip(plain.fetch(80, mx.float16), read, strict=True))


@pytest.mark.parametrize("code_bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [64, 96])
def test_butterflies_move_few_codes_and_decode_to_rounding(code_bits: int, head_dim: int) -> None:
    """TurboQuant MSE: at most 1 code in 10,000 is another one (its neighbour), norms are within one step of fp16, and
    the same codes decode to the same values but for fp32 rounding."""
    spec = KVCacheConfig("turboquant_mse", code_bits=code_bits).layer_spec(0, None, None, None)
    x = mx.array(gaussian((1, 2, 400, head_dim), code_bits))
    plain = spec.keys.encode(x)
    with use_backend("emulator"):
        encoded = spec.keys.encode(x)
        read = spec.keys.decode(plain, mx.float32)
    codes, others = (
        np.array(unpack_codes(each.arrays[0], code_bits, head_dim)).astype(int) for each in (plain, encoded)
    )
    assert np.mean(codes != others) <= MOVED
    assert np.max(np.abs(codes - others)) <= 1
    norms, other_norms = (np.array(each.arrays[1]).astype(float) for each in (plain, encoded))
    np.testing.assert_allclose(other_norms, norms, rtol=2.0**-10)
    expected = spec.keys.decode(plain, mx.float32)
    # errors of random sign: a sum of head_dim products of unit vectors errs by u of their lengths (see attention_error)
    largest_row = float(mx.max(mx.linalg.norm(expected, axis=-1)))
    np.testing.assert_allclose(read, expected, rtol=0, atol=SLACK * ROUNDING[mx.float32] * largest_row)


def test_a_rotation_that_no_kernel_knows_is_packed_by_kernels_alone() -> None:
    """At head_dim 100 there is no Hadamard matrix: plain MLX rotates, and the packing kernels take the codes."""
    spec = KVCacheConfig("turboquant_mse", code_bits=3).layer_spec(0, None, None, None)
    _, held = filled(spec, 100)
    with use_backend("emulator"), emulator.session("checked") as record:
        cache, kernels_held = filled(spec, 100)
        mx.eval(cache.fetch(80, mx.float32))
    assert all(same_bits(a, b) for a, b in zip(held, kernels_held, strict=True))
    assert {launch.kernel for launch in record.launches} == {"pack_codes", "unpack_codes"}


def test_a_model_gives_the_same_logits_through_kernels(llama_model: Any) -> None:
    """Prefill and steps over KIVI caches of every layer: not a bit of the logits differs."""
    tokens = mx.array(np.random.default_rng(0).integers(0, 128, (1, 60)))

    def logits() -> mx.array:
        caches = KVCacheBuilder.build(llama_model, config("kivi"))
        steps = [tokens[:, :57], *(tokens[:, i : i + 1] for i in range(57, 60))]
        return mx.concatenate([llama_model(step, cache=caches) for step in steps], axis=1)

    expected = logits()
    with use_backend("emulator"):
        assert same_bits(logits(), expected)


def test_fisher_klt_decodes_through_its_kernel() -> None:
    """The kernel decodes the integers that C++ decodes, so not a bit of the logits differs."""
    model, tokens = model_of("llama"), mx.array(np.random.default_rng(0).integers(97, 123, (1, 60)))

    def logits() -> mx.array:
        caches = code("layer").caches(model)
        out = mx.concatenate([model(step, cache=caches) for step in (tokens[:, :40], tokens[:, 40:])], axis=1)
        mx.eval(out)
        return out

    expected = logits()
    with use_backend("emulator"), emulator.session("checked", seed=5) as record:
        assert same_bits(logits(), expected)
    assert {launch.kernel for launch in record.launches} == CODED


def test_every_kernel_is_run_by_a_cache() -> None:
    """A kernel that no cache needs has no place in the package."""
    assert set().union(*RUN_BY.values()) | FUSED | CODED == {kernel.stem for kernel in shipped_kernels()}
