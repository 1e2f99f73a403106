"""Configuration errors name what is wrong and what would be right."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction
from typing import Any

import mlx.core as mx
import pytest

from veloxquant_mlx.allocators.allocation import AllocationEntry, BitAllocation
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.methods import METHODS
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.quantizers.base import Coding, pair_name


def test_an_unknown_method_lists_near_matches() -> None:
    """A misspelt method name suggests the right one."""
    with pytest.raises(ValueError, match=r"unknown method 'turboquant_mes'.*turboquant_mse"):
        KVCacheConfig(method="turboquant_mes")


def test_a_field_that_the_method_lacks_lists_near_matches() -> None:
    """A misspelt option suggests the right one, and another method's option is refused."""
    with pytest.raises(TypeError, match=r"no field 'code_bit'; did you mean code_bits"):
        KVCacheConfig(method="turboquant_mse", code_bit=4)
    with pytest.raises(TypeError, match=r"no field 'window_sz'.*window"):
        KVCacheConfig(method="turboquant_mse", window_sz=4)


@pytest.mark.parametrize("fields", [{"code_bits": 9}, {"value_bits": 0}, {"bit_allocation": {"layer_0": 12}}])
def test_a_width_outside_the_method_is_named(fields: dict[str, Any]) -> None:
    """Widths outside 1..8 raise and say which field held which width."""
    with pytest.raises(ValueError, match=r"(code_bits|value_bits|layer_0).* within 1..8.*got (9|0|12)"):
        KVCacheConfig(method="turboquant_mse", **fields)


def test_a_width_must_be_an_int() -> None:
    """2.5 bits is no code width."""
    with pytest.raises(TypeError, match=r"code_bits must be an int, got 2.5"):
        KVCacheConfig(method="turboquant_mse", code_bits=2.5)


@pytest.mark.parametrize("name", ["sinks", "window", "seed"])
def test_counts_are_not_negative(name: str) -> None:
    """sinks, window and seed below zero are refused by name."""
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 0, got -1"):
        KVCacheConfig(method="turboquant_mse", **{name: -1})


def test_a_layer_that_the_model_lacks_is_named(llama_model: Any) -> None:
    """layer_3 of a three-layer model is an error that names it."""
    config = KVCacheConfig(method="turboquant_mse", bit_allocation={f"layer_{i}": 2 for i in range(4)})
    with pytest.raises(ValueError, match="'layer_3', but the model has 3 layers"):
        KVCacheBuilder.build(llama_model, config)


def test_a_layer_that_the_allocation_misses_is_named(llama_model: Any) -> None:
    """An allocation without layer_1 is an error that names it."""
    config = KVCacheConfig(method="turboquant_mse", bit_allocation={"layer_0": 2, "layer_2": 2})
    with pytest.raises(ValueError, match="misses 'layer_1'"):
        KVCacheBuilder.build(llama_model, config)


def test_a_collision_in_the_registry_raises() -> None:
    """Registering a method name twice raises."""
    with pytest.raises(ValueError, match="'turboquant_mse' is registered twice"):
        METHODS.register("turboquant_mse")(METHODS["turboquant_mse"])


def test_value_bits_and_allocation_reach_the_quantizers(llama_model: Any) -> None:
    """Each layer's keys get their allocated width and all values get value_bits."""
    config = KVCacheConfig(
        method="turboquant_mse", bit_allocation={"layer_0": 1, "layer_1": 4, "layer_2": 8}, value_bits=2
    )
    caches = KVCacheBuilder.build(llama_model, config)
    assert [cache.spec.keys.code_bits for cache in caches] == [1, 4, 8]
    assert [cache.spec.values.code_bits for cache in caches] == [2, 2, 2]


def an_allocation(**made_for: Any) -> BitAllocation:
    entries = tuple(AllocationEntry(f"layer_{i}", 2, 256, 64, Fraction(2)) for i in range(3))
    return BitAllocation(entries, unit="layer", target_bits=2.0, **made_for)


@pytest.mark.parametrize(
    ("made_for", "fields", "message"),
    [
        ({"quantizer": "turboquant_static"}, {}, "quantizer is 'turboquant_mse' here.*made for 'turboquant_static'"),
        ({"quantizer": "kivi_keys", "window": 128}, {"base": "kivi"}, "'kivi_keys/affine' here.*made for 'kivi_keys'"),
        ({"quantizer": "turboquant_mse", "sinks": 1}, {}, "sinks is 0 here.*made for 1"),
        ({"quantizer": "turboquant_mse"}, {"window": 8}, "window is 8 here.*made for 0"),
        ({"quantizer": "kivi_keys/affine"}, {"base": "kivi"}, "window is 128 here.*made for 0"),
        ({"quantizer": "turboquant_mse"}, {"value_bits": 3}, "value_bits is 3 here.*made for None"),
    ],
)
def test_an_allocation_is_refused_by_what_it_was_not_made_for(
    made_for: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    """Its bits_per_value would be wrong: the error names the field and both values. The bare widths are accepted."""
    allocation = an_allocation(**made_for)
    with pytest.raises(ValueError, match=message):
        KVCacheConfig(method="ratequant", bit_allocation=allocation, **fields)
    KVCacheConfig(method="ratequant", bit_allocation=dict(allocation), **fields)


def test_an_allocation_is_accepted_by_what_it_was_made_for() -> None:
    """The same quantizers, sinks and window; KIVI's by default."""
    KVCacheConfig(
        method="ratequant", base="kivi", bit_allocation=an_allocation(quantizer="kivi_keys/affine", window=128)
    )
    allocation = an_allocation(quantizer="turboquant_static", sinks=1)
    KVCacheConfig(method="turboquant_static", sinks=1, bit_allocation=allocation)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "turboquant_mse", "code_bits": 4}, "outlier_bits=3 is below code_bits=4"),
        ({"method": "turboquant_prod_adaptive"}, "outlier_bits=3 is below max_bits=4"),
        ({"method": "turboquant_mse", "code_bits": 2, "value_bits": 4}, "outlier_bits=3 is below value_bits=4"),
        (
            {"method": "ratequant", "bit_allocation": {"layer_0": 2, "layer_1": 4}},
            r"outlier_bits=3 is below bit_allocation\['layer_1'\]=4",
        ),
    ],
)
def test_flagged_tokens_are_never_kept_at_fewer_bits(fields: dict[str, Any], message: str) -> None:
    """Their second copy replaces the first on reading: narrower, it would do harm. The error names both widths."""
    with pytest.raises(ValueError, match=message):
        KVCacheConfig(**fields, outlier_observer=KeyNormObserver(), outlier_bits=3)
    KVCacheConfig(**fields, outlier_observer=KeyNormObserver(), outlier_bits=4)


def by_head(layer: int, role: str, widths: list[int]) -> dict[str, int]:
    return {f"layer_{layer}.{role}.head_{head}": bits for head, bits in enumerate(widths)}


def test_an_allocation_may_name_sides_and_heads(llama_model: Any) -> None:
    """layer_0 as a whole, layer_1 by side, layer_2 by head; per-head costs are their mean."""
    allocation = {"layer_0": 3, "layer_1.keys": 4, "layer_1.values": 1}
    allocation |= by_head(2, "keys", [2, 6]) | by_head(2, "values", [1, 1])
    caches = KVCacheBuilder.build(llama_model, KVCacheConfig(method="ratequant", bit_allocation=allocation))
    costs = [(float(c.spec.keys.bits_per_value(64)), float(c.spec.values.bits_per_value(64))) for c in caches]
    assert costs == [(3.25, 3.25), (4.25, 1.25), (4.25, 1.25)]
    llama_model(mx.array([[1, 2, 3]]), cache=caches)
    assert [float(cache.bits_per_value()) for cache in caches] == [3.25, 2.75, 2.75]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer_1.keys": 2}, "names 'layer_1' and parts of it"),
        ({"layer_1.heads": 2}, "names 'layer_1.heads'; units are layer_3, layer_3.keys or layer_3.keys.head_0"),
        ({"layer_1": None, "layer_1.keys": 2}, "misses 'layer_1.values'"),
        ({"layer_1": None, **by_head(1, "keys", [2]), "layer_1.values": 2, "layer_1.keys": 2}, "and heads of it"),
        ({"layer_1": None, "layer_1.keys.head_1": 2, "layer_1.values": 2}, r"misses 'layer_1\.keys\.head_0'"),
    ],
)
def test_a_contradictory_allocation_is_named(llama_model: Any, changed: dict[str, Any], message: str) -> None:
    """Units that overlap, are misspelt or incomplete raise errors that name them."""
    allocation = {f"layer_{i}": 2 for i in range(3)} | changed
    allocation = {unit: bits for unit, bits in allocation.items() if bits is not None}
    with pytest.raises(ValueError, match=message):
        KVCacheBuilder.build(llama_model, KVCacheConfig(method="ratequant", bit_allocation=allocation))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_a_wrong_number_of_heads_is_found_when_caches_are_built(llama_model: Any, role: str, heads: int) -> None:
    """The model has two KV heads per layer: an allocation for one or three names the layer, its side and both."""
    other = {"keys": "values", "values": "keys"}[role]
    allocation = {"layer_0": 2, "layer_2": 2, f"layer_1.{other}": 2, **by_head(1, role, [2] * heads)}
    config = KVCacheConfig(method="ratequant", bit_allocation=allocation)
    with pytest.raises(ValueError, match=rf"names {heads} heads of 'layer_1\.{role}', which has 2"):
        KVCacheBuilder.build(llama_model, config)


def test_a_configuration_can_be_copied_with_changes() -> None:
    """dataclasses.replace keeps every field, the method's own included, and checks what it changes."""
    config = KVCacheConfig(method="kivi", code_bits=4, group_size=16, window=64, seed=3)
    assert dataclasses.replace(config) == config
    changed = dataclasses.replace(config, sinks=2, code_bits=2)
    assert changed == KVCacheConfig(method="kivi", code_bits=2, group_size=16, window=64, seed=3, sinks=2)
    with pytest.raises(ValueError, match="sinks must be an int of at least 0, got -1"):
        dataclasses.replace(config, sinks=-1)
    with pytest.raises(TypeError, match=r"options must be RVQOptions for 'rvq', got KIVIOptions\("):
        dataclasses.replace(config, method="rvq")


def test_methods_of_one_width_refuse_an_allocation() -> None:
    """Ternary has no width to allocate, and ratequant must have an allocation and a base with widths."""
    with pytest.raises(ValueError, match="'ternary' has no width"):
        KVCacheConfig(method="ternary", bit_allocation={"layer_0": 2})
    with pytest.raises(ValueError, match="'ratequant' needs a bit_allocation"):
        KVCacheConfig(method="ratequant")
    with pytest.raises(ValueError, match="base='ternary' has no width to allocate"):
        KVCacheConfig(method="ratequant", base="ternary", bit_allocation={"layer_0": 2})


def test_ratequant_takes_its_base_and_the_bases_options(llama_model: Any) -> None:
    """base="kivi" brings KIVI's quantizers, window and group size; width 0 exists with static scales only."""
    allocation = {f"layer_{i}": 2 for i in range(3)}
    config = KVCacheConfig(method="ratequant", base="kivi", base_options={"group_size": 16}, bit_allocation=allocation)
    (spec, *_) = [cache.spec for cache in KVCacheBuilder.build(llama_model, config)]
    assert (spec.keys.block_tokens, spec.window) == (16, 128)
    zero = {**allocation, "layer_1": 0}
    with pytest.raises(ValueError, match=r"layer_1'\] must be within 1..8 for ratequant, got 0"):
        KVCacheConfig(method="ratequant", bit_allocation=zero)
    caches = KVCacheBuilder.build(
        llama_model, KVCacheConfig(method="ratequant", base="turboquant_static", bit_allocation=zero)
    )
    llama_model(mx.array([list(range(100))]), cache=caches)
    assert [float(cache.bits_per_value()) for cache in caches] == [2, 0, 2]


def test_an_option_outside_its_range_fails_when_configured() -> None:
    """A group of one channel is refused by the configuration, not by the first token."""
    with pytest.raises(ValueError, match="group_size must be an int of at least 2, got 1"):
        KVCacheConfig(method="kivi", group_size=1)


@pytest.mark.parametrize(
    ("given", "here", "counted"),
    [
        ({"method": "affine", "group_size": 8}, "affine(group_size=8)", "affine(group_size=32)"),
        (
            {"method": "ratequant", "base": "affine", "base_options": {"group_size": 8}},
            "affine(group_size=8)",
            "affine(group_size=32)",
        ),
        ({"method": "kivi", "group_size": 16, "window": 0}, "kivi_keys(group_size=16)", "kivi_keys(group_size=32)"),
        (
            {"method": "turboquant_static", "calibration": 128},
            "turboquant_static(calibration=128)",
            "turboquant_static(calibration=64)",
        ),
    ],
)
def test_an_allocation_is_refused_by_other_parameters_than_it_counts(
    given: dict[str, Any], here: str, counted: str
) -> None:
    """Groups of 8 channels cost 4 bits each, groups of 32 one: the error names both. Without a record of them, as in
    files saved before it was kept, the quantizer's name has to do; a seed moves no byte."""
    default = KVCacheConfig(method=given.get("base", given["method"]), window=0)
    made = [default.quantizer(role, None) for role in ("keys", "values")]
    codings = tuple(Coding.of(one) for one in made)
    allocation = an_allocation(quantizer=pair_name(*made), codings=codings)
    assert BitAllocation.from_json(allocation.to_json()) == allocation
    message = f"quantizer of keys is {here!r} here, but the bit_allocation was made for {counted!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        KVCacheConfig(**given, bit_allocation=allocation)
    fields = json.loads(allocation.to_json())
    del fields["codings"]
    KVCacheConfig(**given, bit_allocation=BitAllocation.from_json(json.dumps(fields)))
    KVCacheConfig(**given, bit_allocation=dict(allocation))
    options = {name: value for name, value in given.items() if name in ("method", "base")}
    KVCacheConfig(**options, window=0, seed=3, bit_allocation=allocation)


def test_an_allocation_and_an_outlier_observer_exclude_each_other() -> None:
    """Second copies of flagged tokens cost beyond what the allocation counts; bare widths claim nothing."""
    allocation = an_allocation(quantizer="turboquant_mse")
    observer = KeyNormObserver()
    with pytest.raises(ValueError, match=r"outlier_observer is KeyNormObserver.*made for None.*pass dict"):
        KVCacheConfig("ratequant", bit_allocation=allocation, outlier_observer=observer)
    KVCacheConfig("ratequant", bit_allocation=dict(allocation), outlier_observer=observer)


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [("4", TypeError, "must be an int, got '4'"), (16, ValueError, "must be within 1..8 .*got 16")],
)
def test_a_width_is_checked_before_it_is_compared_with_outlier_bits(
    bits: Any, error: type[Exception], message: str
) -> None:
    """Beside an observer too, an allocation's wrong width is called what it is."""
    with pytest.raises(error, match=rf"bit_allocation\['layer_0'\] {message}"):
        KVCacheConfig("ratequant", bit_allocation={"layer_0": bits}, outlier_observer=KeyNormObserver())
