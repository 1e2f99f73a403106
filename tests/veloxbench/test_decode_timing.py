"""What the timing gate times: where its weights lie is drawn anew for every sample, and nothing else changes."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from veloxbench.decode_timing import DecodeBenchmark, DecodeSpec


@pytest.fixture(scope="module")
def benchmark_of_cut_model(cut_model):
    return DecodeBenchmark(DecodeSpec(model=str(cut_model), depth=8, steps=1))


def places(benchmark):
    return {name: np.array(array, copy=False).ctypes.data for name, array in leaves(benchmark)}


def leaves(benchmark):
    return tree_flatten(benchmark.model.parameters())


def test_relocated_weights_lie_elsewhere_and_are_the_same(benchmark_of_cut_model):
    """Every matrix moves, no bit of any array changes, and the extra work streams the moved weights."""
    before = {name: (np.array(array).tobytes(), array) for name, array in leaves(benchmark_of_cut_model)}
    at = places(benchmark_of_cut_model)
    benchmark_of_cut_model.relocate(np.random.default_rng(0))
    now = places(benchmark_of_cut_model)
    for name, array in leaves(benchmark_of_cut_model):
        assert np.array(array).tobytes() == before[name][0]
        assert array.dtype == before[name][1].dtype
        if array.ndim == 2:
            assert now[name] != at[name]
    largest = benchmark_of_cut_model._weights
    assert any(array is largest for _, array in leaves(benchmark_of_cut_model))


def test_on_a_processor_every_sample_moves_the_weights(benchmark_of_cut_model, monkeypatch):
    """On a GPU none does."""
    moved = []
    monkeypatch.setattr(benchmark_of_cut_model, "relocate", moved.append)
    benchmark_of_cut_model.sample()
    benchmark_of_cut_model.sample(extra_rows=10)
    assert len(moved) == (2 if mx.default_device() == mx.cpu else 0)
