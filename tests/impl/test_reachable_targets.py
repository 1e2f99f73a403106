"""A target is what a cache of 2048 tokens costs: never more, and at most 1% less, for every method that has widths."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gaussian, tiny_llama

from veloxquant_mlx.allocators.ratequant import (
    BitAllocation,
    DistortionCurves,
    allocate_bits_ratequant,
    fit_distortion_curve,
)
from veloxquant_mlx.allocators.sensitivity import HeadSensitivities, Provenance, Sensitivities
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.methods import METHODS, make_options

TOKENS, LAYERS, HEADS, HEAD_DIM = 2048, 20, 3, 64
TARGETS = (4.0, 3.0, 2.0, 1.5, 1.0)
BASES = [name for name in METHODS if METHODS[name].allocatable and not METHODS[name].needs_allocation]


def by_formula(base: str) -> float:
    """Cost of the smallest width by the method's own formula, its default window in fp16."""
    options = make_options(base, {})
    sides = [options.quantizer(role, options.widths.start, 0).bits_per_value(HEAD_DIM) for role in ("keys", "values")]
    coded = float(sum(sides)) / 2
    return coded + (16 - coded) * options.default_window / TOKENS


BY_HAND = {
    "turboquant_mse": 1 + 16 / 64,
    "turboquant_prod": 1 + 32 / 64,
    "rvq": 1 + 16 / 64,
    "affine": 1 + 32 / 32,
    "kivi": 1 + 32 / 32 + (16 - 2) * 128 / TOKENS,
    "turboquant_static": 0.0,
}
"""Cost of the smallest width: code, scales or norm, KIVI's fp16 window."""
LOWEST = {base: by_formula(base) for base in BASES}


@cache
def curves_of(base: str) -> DistortionCurves:
    """Curves of random vectors, every unit with another weight."""
    rng = np.random.default_rng(0)
    heads = tuple(
        HeadSensitivities(
            layer,
            kind,
            np.broadcast_to(np.exp(rng.normal(0, 2, (1, HEADS, 1))), (1, HEADS, 64)),
            mx.array(gaussian((1, HEADS, 64, HEAD_DIM), 2 * layer + (kind == "keys"))).astype(mx.float16),
            mx.zeros((1, HEADS, 64, HEAD_DIM)),
        )
        for layer in range(LAYERS)
        for kind in ("keys", "values")
    )
    sensitivities = Sensitivities(heads, Provenance("m", "t", 1, 64, "llama", LAYERS))
    options = make_options(base, {})
    return fit_distortion_curve(
        sensitivities,
        options.factories(),
        widths=[bits for bits in options.widths if bits <= 4],
        weighting="token",
    )


def test_the_lowest_costs_are_those_counted_by_hand() -> None:
    """The formulas of the methods that stand here give what their layouts say."""
    assert {base: LOWEST[base] for base in BY_HAND} == pytest.approx(BY_HAND)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("base", BASES)
def test_a_target_is_met_from_below_within_one_percent_or_refused(base: str, target: float) -> None:
    """Bytes of all layers at 2048 tokens, by the formula that other tests hold against the arrays."""
    curves, window = curves_of(base), make_options(base, {}).default_window

    def allocate() -> BitAllocation:
        low, high = min(curves.widths), max(curves.widths)
        return allocate_bits_ratequant(curves, target, low, high, unit="head", window=window)

    if target < LOWEST[base]:
        with pytest.raises(ValueError, match=f"already costs {LOWEST[base]:g} bits_per_value"):
            allocate()
        return
    config = KVCacheConfig(method="ratequant", base=base, bit_allocation=allocate())
    caches = KVCacheBuilder.build(tiny_llama(LAYERS, HEAD_DIM, 6, HEADS), config)
    shape = {"n_kv_heads": HEADS, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM}
    used = sum(Fraction(one.spec.expected_nbytes(TOKENS, **shape)) for one in caches)
    bits = 8 * used / (LAYERS * TOKENS * HEADS * 2 * HEAD_DIM)
    assert 0.99 * target <= float(bits) <= target


@pytest.mark.parametrize("base", BASES)
def test_the_arrays_of_a_cache_cost_what_its_widths_say(base: str) -> None:
    """One layer, its heads at three widths, filled with 2048 tokens: bytes in use equal the formula."""
    allocation = {f"layer_0.{kind}.head_{head}": head + 1 for kind in ("keys", "values") for head in range(HEADS)}
    (one,) = KVCacheBuilder.build(
        tiny_llama(1, HEAD_DIM, 6, HEADS), KVCacheConfig(method="ratequant", base=base, bit_allocation=allocation)
    )
    x = mx.array(gaussian((1, HEADS, TOKENS, HEAD_DIM)))
    mx.eval(one.update_and_fetch(x, x))
    used = sum(Fraction(held.array.nbytes * held.used_slots, held.slots) for held in one.held_arrays())
    shape = {"n_kv_heads": HEADS, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM}
    assert used == one.spec.expected_nbytes(TOKENS, **shape)
    mean = LOWEST[base] + (1 if base != "turboquant_static" else 2)  # widths 1, 2, 3 are one above the lowest
    if base == "kivi":
        mean -= 128 / TOKENS  # the window's tokens have no code to widen
    assert float(8 * used / (TOKENS * HEADS * 2 * HEAD_DIM)) == pytest.approx(mean)


def bits_held(base: str, allocation: BitAllocation, tokens: int, sinks: int = 0) -> Fraction:
    """Bits per value that the caches' arrays have in use after ``tokens`` tokens of every layer."""
    config = KVCacheConfig("ratequant", base=base, bit_allocation=allocation, sinks=sinks)
    used = Fraction(0)
    x = mx.array(gaussian((1, HEADS, tokens, HEAD_DIM)))
    for one in KVCacheBuilder.build(tiny_llama(LAYERS, HEAD_DIM, 6, HEADS), config):
        one.update_and_fetch(x, x)
        used += sum(Fraction(held.array.nbytes * held.used_slots, held.slots) for held in one.held_arrays())
    return 8 * used / (LAYERS * tokens * HEADS * 2 * HEAD_DIM)


@pytest.mark.parametrize("unit", ["layer", "layer_kv"])
@pytest.mark.parametrize(("at_tokens", "target"), [(200, 11.9), (223, 11.5), (2079, 3.9), (2080, 3.9)])
def test_a_target_holds_at_lengths_that_leave_a_block_of_keys_incomplete(
    at_tokens: int, target: float, unit: str
) -> None:
    """KIVI keeps up to 31 keys beside its window in fp16: arrays cost what the allocation says, below the target."""
    allocation = allocate_bits_ratequant(
        curves_of("kivi"), target, 1, 4, unit=unit, window=128, at_tokens=at_tokens, solver="greedy"
    )
    assert bits_held("kivi", allocation, at_tokens) == allocation.bits_per_value <= target


@pytest.mark.parametrize("at_tokens", [63, 64, 65])
def test_tokens_that_wait_for_a_calibration_are_paid_for(at_tokens: int) -> None:
    """Static scales are calibrated on 64 tokens: 63 are all in fp16, 64 all in code."""
    target = 16 if at_tokens < 64 else 2
    allocation = allocate_bits_ratequant(curves_of("turboquant_static"), target, 0, 4, at_tokens=at_tokens)
    assert 0.99 * target <= bits_held("turboquant_static", allocation, at_tokens) <= target
    assert bits_held("turboquant_static", allocation, at_tokens) == allocation.bits_per_value
