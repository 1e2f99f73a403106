"""Tokens, threads and models that are out of the ordinary: what they cost stays with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import ALL_METHODS, gaussian

from veloxquant_mlx.cache.base import KVCacheConfig, PackedKVCache
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic

TOKENS, ODD = 200, 90
GROUP = {"kivi": 8}
"""Tokens that share a scale with an odd one, where that is more than itself."""


def filled(method: str, x: np.ndarray, dtype: mx.Dtype = mx.float32, **options: Any) -> PackedKVCache:
    """A cache of one layer that holds ``x`` as keys and values."""
    own = {"bit_allocation": {"layer_0": 4}} if method == "ratequant" else ALL_METHODS[method]
    config = KVCacheConfig(method, **{**own, **options})
    keys, values = config.layer_widths([True])[0]
    cache = PackedKVCache(config.layer_spec(0, keys, values, None))
    half = mx.array(x).astype(dtype)
    cache.update_and_fetch(half, half)
    return cache


def read(cache: PackedKVCache) -> np.ndarray:
    """The keys that attention reads, in fp32."""
    assert cache.keys is not None
    return np.array(cache.keys.astype(mx.float32))


def distortion(got: np.ndarray, wanted: np.ndarray) -> float:
    """Squared error over squares."""
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_value_that_is_not_finite_stays_with_its_token(method: str, value: float) -> None:
    """Its token does not decode to numbers; tokens outside its group and other heads decode as without it."""
    x = gaussian((1, 2, TOKENS, 64))
    expected = distortion(read(filled(method, x)), x)
    x[0, 0, ODD, 5] = value
    got = read(filled(method, x))
    finite = np.isfinite(got).all(axis=-1)
    assert not finite[0, 0, ODD]
    assert finite[0, 1].all()
    assert np.sum(~finite) <= GROUP.get(method, 1)
    assert distortion(got[finite], x[finite]) < 2 * expected  # a group's choice of width may move


@pytest.mark.parametrize(("dtype", "size"), [(mx.float16, 65504.0), (mx.bfloat16, 1e38)])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_finite_keys_stay_finite(method: str, size: float, dtype: mx.Dtype) -> None:
    """Channels of either sign at the end of fp16's range, and far beyond it as bf16 models have them."""
    x = gaussian((1, 2, TOKENS, 64))
    x[..., 3], x[..., 4] = size, -size
    assert np.isfinite(read(filled(method, x, dtype))).all()


@pytest.mark.parametrize("method", ALL_METHODS)
def test_no_tokens_are_no_change(method: str) -> None:
    """An update of zero tokens returns what is held, on a filled, an emptied and a new cache."""
    none = mx.zeros((1, 2, 0, 64))
    cache = filled(method, gaussian((1, 2, 40, 64)), sinks=2)
    held = read(cache)
    assert np.array_equal(np.array(cache.update_and_fetch(none, none)[0].astype(mx.float32)), held)
    cache.trim(40)
    assert cache.update_and_fetch(none, none)[0].shape == (1, 2, 0, 64)
    assert all(array.slots > 0 for array in cache.held_arrays())


def first_tokens(kind: str, x: np.ndarray) -> None:
    """Make the first 64 tokens odd."""
    head = x[:, :, :64]
    if kind == "equal":
        head[:] = head[:, :, :1]
    elif kind == "zero":
        head[:] = 0
    elif kind == "small":
        head *= 1e-4
    elif kind.startswith("scale"):
        head *= float(kind.split()[1])
    elif kind == "rank one":
        head[:] = head[:, :, :1, :1] * head[:, :, :1]
        head[:, :, 1::2] *= -1
    elif kind == "nearly equal":
        head[:] = head[:, :, :1] + 1e-3 * head
    else:
        head[:, :, 3] *= 1000


@pytest.mark.parametrize(
    "kind",
    [
        *("equal", "zero", "small", "nearly equal", "rank one", "one of 1000 times the size"),
        *("scale 0.36", "scale 2.8", "scale 300"),
    ],
)
def test_a_calibration_on_odd_tokens_does_not_spoil_later_ones(kind: str) -> None:
    """Later Gaussian tokens keep within 4 times Lloyd-Max's .0095 at 4 bits (Max 1960): a step twice too large."""
    x = gaussian((1, 2, 300, 64))
    first_tokens(kind, x)
    got = read(filled("turboquant_static", x, code_bits=4, calibration=64))
    theory = TurboQuantStatic(4).expected_distortion(64)
    assert theory == pytest.approx(0.0095, abs=5e-5)
    recovered = 64 + 4 * (kind == "scale 300") + 16 * (kind in ("scale 2.8", "scale 0.36"))
    assert distortion(got[:, :, recovered:], x[:, :, recovered:]) < 4 * theory


def run(*work: Callable[[], object]) -> None:
    """Each in a thread of its own, at once; the first error is raised."""
    errors: list[BaseException] = []

    def safely(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=safely, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("method", ALL_METHODS)
def test_tables_outlive_the_thread_that_asked_first(method: str) -> None:
    """A thread under a stream of its own uses a cache and ends without evaluating; another uses the same tables."""
    x = gaussian((1, 2, TOKENS, 48))
    own = sum(map(ord, method))  # a seed whose tables no other test has made

    def lazily() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            filled(method, x, seed=own)

    run(lazily)
    assert np.isfinite(read(filled(method, x, seed=own))).all()


def test_threads_at_once_agree() -> None:
    """Four threads that ask for the same tables at once read the same keys."""
    x = gaussian((1, 2, TOKENS, 64))
    read_by: list[np.ndarray] = []
    run(*[lambda: read_by.append(read(filled("turboquant_static", x, seed=4711)))] * 4)
    assert len(read_by) == 4
    assert all(np.array_equal(keys, read_by[0]) for keys in read_by)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_models_may_assign_a_side(method: str) -> None:
    """What was read and is assigned back changes nothing; other keys are coded; another shape is refused."""
    x = gaussian((1, 2, TOKENS, 64))
    cache = filled(method, x)
    before, nbytes = read(cache), cache.nbytes
    cache.keys, cache.values = cache.keys, cache.values
    assert np.array_equal(read(cache), before)
    assert cache.nbytes == nbytes
    cache.keys = mx.array(2 * before)
    assert distortion(read(cache), 2 * before) <= distortion(before, x) * 2
    with pytest.raises(ValueError, match=r"keys can be assigned in the shape"):
        cache.keys = mx.zeros((1, 2, 3, 64))
