"""Configuration errors name what is wrong and what would be right."""

from __future__ import annotations

from typing import Any

import pytest

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.methods import METHODS


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
