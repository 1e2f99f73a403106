"""mlx-lm's test_prompt_cache.py runs against our caches, its assertions unmodified.

Only names of the test module are rebound: the model path, KVCache, QuantizedKVCache, BatchKVCache and the save and load
functions. Ours have no constructor without arguments, so small subclasses supply a layer spec.
"""

from __future__ import annotations

import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from mlx_lm_sources import test_source as mlx_lm_test_source

from veloxbench.inputs.models import resolve_model
from veloxquant_mlx.cache.base import (
    BatchPackedKVCache,
    LayerSpec,
    PackedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from veloxquant_mlx.quantizers.affine import Affine
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

AGAINST_OURS = (
    "test_save_load",
    "test_save_load_mixed_cache",
    "test_save_load_cache_list",
    "test_trim_cache",
    "test_cache_list",
    "test_make_mask_with_cache",
    "test_batch_kv_cache",
    "test_batch_kv_cache_offset_not_mutated_in_place",
    "test_save_load_batch_caches",
    "test_extend_with_empty_and_nonempty_batch_caches",
    "test_extend_with_empty_batch_cache_preserves_dtype",
    "test_window_mask_with_full_kv_cache",
)

NOT_APPLICABLE = {
    "test_save_load_rotating_cache": "RotatingKVCache alone, which is not rebound",
    "test_rotating_cache_mask": "RotatingKVCache alone",
    "test_rotating_cache_updates": "RotatingKVCache alone",
    "test_batch_rotating_kv_cache": "BatchRotatingKVCache alone",
    "test_save_load_arrays_cache": "ArraysCache alone",
    "test_arrays_cache_extend_with_empty": "ArraysCache alone",
    "test_arrays_cache_advance": "ArraysCache alone",
    "test_cache_with_generate": "make_prompt_cache's own caches, which are not rebound",
    "test_trim_cache_with_generate": "make_prompt_cache's own caches",
    "test_cache_to_quantized": "make_prompt_cache's own caches",
    "test_cache_copying": "asserts that stored fp32 values come back to 1e-5: no quantized cache can",
    "test_save_load_quantized_cache": "reads .bits and .group_size, on which mlx-lm routes attention elsewhere",
    "test_merge_with_empty_caches": "merges RotatingKVCache objects through KVCache.merge",
}

BUILT: list[str] = []


class KVCache(PackedKVCache):
    """8-bit TurboQuant where the tests ask for a KVCache."""

    def __init__(self) -> None:
        super().__init__(LayerSpec(TurboQuantMSE(8), TurboQuantMSE(8)))
        BUILT.append("KVCache")


class QuantizedKVCache(PackedKVCache):
    """Affine codes where the tests ask for a QuantizedKVCache."""

    def __init__(self, group_size: int = 64, bits: int = 8) -> None:
        super().__init__(LayerSpec(Affine(bits, group_size), Affine(bits, group_size)))
        BUILT.append("QuantizedKVCache")


class BatchKVCache(BatchPackedKVCache):
    """The batch form of 8-bit TurboQuant."""

    def __init__(self, left_padding: list[int]) -> None:
        super().__init__(LayerSpec(TurboQuantMSE(8), TurboQuantMSE(8)), left_padding)
        BUILT.append("BatchKVCache")


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """mlx-lm's test class in a module whose names are rebound."""
    module = types.ModuleType("mlx_lm_test_prompt_cache")
    exec(compile(mlx_lm_test_source("test_prompt_cache.py"), "test_prompt_cache.py", "exec"), module.__dict__)
    rebound = {
        "HF_MODEL_PATH": str(resolve_model("smollm2-135m").directory),
        "KVCache": KVCache,
        "QuantizedKVCache": QuantizedKVCache,
        "BatchKVCache": BatchKVCache,
        "save_prompt_cache": save_prompt_cache,
        "load_prompt_cache": load_prompt_cache,
    }
    assert set(rebound) <= set(vars(module))
    vars(module).update(rebound)
    case = module.TestPromptCache
    case.setUpClass()
    yield case
    case.tearDownClass()


def test_every_test_of_theirs_is_accounted_for(theirs: Any) -> None:
    """Each test of mlx-lm's file is either run against ours (at least 11) or listed with a reason."""
    names = set(unittest.TestLoader().getTestCaseNames(theirs))
    assert names == set(AGAINST_OURS) | set(NOT_APPLICABLE)
    assert not set(AGAINST_OURS) & set(NOT_APPLICABLE)
    assert len(AGAINST_OURS) >= 11


@pytest.mark.parametrize("name", AGAINST_OURS)
def test_their_test_passes_on_our_caches(theirs: Any, name: str) -> None:
    """mlx-lm's test passes unmodified, and it did build caches of ours."""
    BUILT.clear()
    result = unittest.TestResult()
    theirs(name).run(result)
    problems = "\n".join(text for _, text in [*result.failures, *result.errors])
    assert result.testsRun == 1
    assert result.wasSuccessful(), problems
    assert BUILT
