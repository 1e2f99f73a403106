"""Random walks of 200 steps: every method's cache against a plain model of it, token by token in Python lists."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from impl_inputs import ALL_METHODS, gaussian

from veloxquant_mlx.cache.base import (
    BatchPackedKVCache,
    KVCacheConfig,
    LayerSpec,
    PackedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from veloxquant_mlx.observers.key_norm import KeyNormObserver
from veloxquant_mlx.quantizers.base import Arrays, Quantizer

N_HEADS, HEAD_DIM = 2, 16
MAX_SEQUENCES = 3

FLIPPED = 0.02
"""Share of tokens that may differ in a code: fp32 rounding of a product depends on how many rows it has."""


Token = tuple[mx.array, mx.array | None]
"""A token ``[1, H, 1, D]``, and what it decodes to at the outliers' width if it is flagged."""


class PlainSide:
    """Keys or values as three lists of tokens: sinks, coded (as decoded), tail."""

    def __init__(self, quantizer: Quantizer, outliers: Quantizer | None, sinks: int, window: int) -> None:
        self.quantizer, self.outliers, self.sinks, self.window = quantizer, outliers, sinks, window
        self.sink: list[Token] = []
        self.coded: list[Token] = []
        self.tail: list[Token] = []
        self.static: Arrays | None = None

    def append(self, tokens: list[mx.array], flags: list[bool]) -> None:
        for token, flag in zip(tokens, flags, strict=True):
            early = len(self.sink) < self.sinks and not self.coded and not self.tail
            kept = self.outliers.decode(self.outliers.encode(token), mx.float32) if flag and self.outliers else None
            (self.sink if early else self.tail).append((token, kept))
        block = self.quantizer.block_tokens
        ready = max(0, len(self.tail) - self.window) // block * block
        if not self.coded:
            if ready < self.quantizer.calibration_tokens:
                return
            self.static = None
        while ready >= block:
            chunk = joined(self.tail[:block])
            if self.static is None:
                first = self.quantizer.calibration_tokens
                self.static = self.quantizer.calibrate(joined(self.tail[:first]) if first else chunk)
            decoded = self.quantizer.decode(self.quantizer.encode(chunk, self.static), mx.float32)
            for x, (_, kept) in zip(mx.split(decoded, block, axis=2), self.tail[:block], strict=True):
                self.coded.append((x if kept is None else kept, kept))
            self.tail, ready = self.tail[block:], ready - block

    def trim(self, n: int) -> None:
        while n and self.tail:
            self.tail.pop()
            n -= 1
        cut = bool(n)
        while n and self.coded:
            self.coded.pop()
            n -= 1
        if cut:
            rest = len(self.coded) % self.quantizer.block_tokens
            if rest:
                self.tail = [(token.astype(mx.float16), kept) for token, kept in self.coded[-rest:]]
                self.coded = self.coded[:-rest]
        if n:
            self.sink = self.sink[:-n]

    def tokens(self) -> list[mx.array]:
        return [token for token, _ in self.sink + self.coded + self.tail]


def joined(tokens: list[Token]) -> mx.array:
    return mx.concatenate([token for token, _ in tokens], axis=2)


class PlainCache:
    """Both sides of one sequence."""

    def __init__(self, spec: LayerSpec, observer: KeyNormObserver | None) -> None:
        quantizers = ((spec.keys, spec.outlier_keys), (spec.values, spec.outlier_values))
        self.sides = [PlainSide(*pair, spec.sinks, spec.window) for pair in quantizers]
        self.tracker = None if observer is None else observer.tracker(0)
        self.length = 0

    def append(self, keys: mx.array, values: mx.array) -> None:
        flags = [False] * keys.shape[2] if self.tracker is None else self.tracker.flag(keys)[0].tolist()
        for side, x in zip(self.sides, (keys, values), strict=True):
            side.append(mx.split(x, x.shape[2], axis=2), flags)
        self.length += keys.shape[2]

    def trim(self, n: int) -> None:
        for side in self.sides:
            side.trim(n)
        self.length -= n


def assert_same(got: mx.array, plain: PlainSide) -> None:
    """The last tokens of the plain model, up to a few codes that rounding flipped."""
    n = got.shape[2]
    if not n:
        return
    want = mx.concatenate(plain.tokens()[-n:], axis=2)
    difference = np.array(mx.abs(got.astype(mx.float32) - want.astype(mx.float32)).max(axis=(0, 1, 3)))
    assert difference.max() < 2.0  # inputs are N(0, 1): a neighbouring level, never another token
    assert (difference > 1e-4).sum() <= max(1, FLIPPED * n)


def walk(method: str, outliers: bool) -> type[RuleBasedStateMachine]:
    """The state machine of one method, with an observer that flags every sixth token or without."""

    class Walk(RuleBasedStateMachine):
        @initialize(sinks=st.sampled_from([0, 3]), window=st.sampled_from([0, 5]), max_size=st.sampled_from([None, 24]))
        def begin(self, sinks: int, window: int, max_size: int | None) -> None:
            fields = {**ALL_METHODS[method], "sinks": sinks, "window": window}
            self.observer = KeyNormObserver(outlier_threshold=1.0) if outliers else None
            config = KVCacheConfig(method=method, outlier_observer=self.observer, **fields)
            self.spec = config.layer_spec(0, *config.layer_widths([True] * 3)[0], max_size)
            cache = PackedKVCache(self.spec, outlier_observer=self.observer)
            self.sequences = [(cache, PlainCache(self.spec, self.observer))]
            self.seed = 0

        def fresh(self, n: int, n_batch: int = 1) -> tuple[mx.array, mx.array]:
            self.seed += 1
            keys, values = (gaussian((n_batch, N_HEADS, n, HEAD_DIM), self.seed * 2 + i) for i in range(2))
            return mx.array(keys).astype(mx.float16), mx.array(values).astype(mx.float16)

        def at(self, index: int) -> int:
            return index % len(self.sequences)

        def check(self, cache: PackedKVCache, plain: PlainCache) -> None:
            assert cache.offset == plain.length
            if not cache.empty():
                for got, side in zip(cache.fetch(cache.size(), mx.float32), plain.sides, strict=True):
                    assert got.shape[2] == cache.size()
                    assert_same(got, side)
            in_use = sum(h.array.nbytes * h.used_slots / h.slots for h in cache.held_arrays())
            assert in_use == cache.formula_nbytes()
            assert all(h.used_slots <= h.slots for h in cache.held_arrays())

        @rule(index=st.integers(0, 9), n=st.integers(1, 40))
        def update(self, index: int, n: int) -> None:
            cache, plain = self.sequences[self.at(index)]
            keys, values = self.fresh(n)
            fetched = cache.update_and_fetch(keys, values)
            plain.append(keys, values)
            visible = plain.length if self.spec.max_size is None else min(plain.length, self.spec.max_size - 1 + n)
            for got, side in zip(fetched, plain.sides, strict=True):
                assert got.shape == (1, N_HEADS, visible, HEAD_DIM)
                assert_same(got, side)

        @rule(index=st.integers(0, 9), n=st.integers(1, 30))
        def trim(self, index: int, n: int) -> None:
            cache, plain = self.sequences[self.at(index)]
            if cache.is_trimmable():
                trimmed = cache.trim(n)
                assert trimmed == min(n, plain.length)
                plain.trim(trimmed)
                self.check(cache, plain)

        @rule(index=st.integers(0, 9))
        def save_and_load(self, index: int) -> None:
            i = self.at(index)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache.safetensors"
                save_prompt_cache(path, [self.sequences[i][0]])
                (loaded,) = load_prompt_cache(path, outlier_observer=self.observer)
                mx.eval([h.array for h in loaded.held_arrays()])
            self.sequences[i] = (loaded, self.sequences[i][1])
            self.check(*self.sequences[i])

        @precondition(lambda self: len(self.sequences) < MAX_SEQUENCES)
        @rule(index=st.integers(0, 9))
        def copy_one(self, index: int) -> None:
            original = self.sequences[self.at(index)]
            twin = copy.deepcopy(original)
            self.sequences.append(twin)
            keys, values = self.fresh(2)
            twin[0].update_and_fetch(keys, values)
            twin[1].append(keys, values)
            self.check(*original)
            self.check(*twin)

        @precondition(lambda self: len(self.sequences) > 1)
        @rule(index=st.integers(0, 9))
        def drop_one(self, index: int) -> None:
            del self.sequences[self.at(index)]

        @rule(
            lengths=st.lists(st.integers(0, 12), min_size=MAX_SEQUENCES, max_size=MAX_SEQUENCES), cut=st.integers(0, 3)
        )
        def through_a_batch(self, lengths: list[int], cut: int) -> None:
            """Merge, process a right-padded chunk and a single token, split in two, rejoin, save, extract."""
            plains = [plain for _, plain in self.sequences]
            batch: Any = PackedKVCache.merge([cache for cache, _ in self.sequences])
            lengths = lengths[: len(plains)]
            widest = max(lengths)
            if widest:
                batch.prepare(lengths=lengths, right_padding=[widest - n for n in lengths])
                keys, values = self.fresh(widest, len(plains))
                batch.update_and_fetch(keys, values)
                batch.finalize()
                for i, n in enumerate(lengths):
                    if n:
                        plains[i].append(keys[i : i + 1, :, :n], values[i : i + 1, :, :n])
            cut = min(cut, len(plains) - 1)
            if cut:
                other = copy.deepcopy(batch)
                batch.filter(list(range(cut)))
                other.filter(mx.array(list(range(cut, len(plains)))))
                batch.extend(other)
            batch = BatchPackedKVCache.from_state(batch.state)
            if self.observer is not None:
                batch.attach_outlier_observer(self.observer)
            keys, values = self.fresh(1, len(plains))
            fetched = batch.update_and_fetch(keys, values)
            for i, plain in enumerate(plains):
                plain.append(keys[i : i + 1], values[i : i + 1])
                for got, side in zip(fetched, plain.sides, strict=True):
                    visible = min(plain.length, got.shape[2])
                    assert_same(got[i : i + 1, :, got.shape[2] - visible :], side)
                    assert not mx.any(got[i, :, : got.shape[2] - visible])
            assert batch.offset.tolist() == [plain.length for plain in plains]
            self.sequences = [(batch.extract(i), plain) for i, plain in enumerate(plains)]
            for cache, plain in self.sequences:
                self.check(cache, plain)

    return Walk


@pytest.mark.parametrize("walks", [1, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "outliers"), [*((method, False) for method in ALL_METHODS), ("kivi", True)])
def test_two_hundred_steps_agree_with_a_plain_model(method: str, outliers: bool, walks: int) -> None:
    """update, trim, save, load, copy, batch split and merge in any order keep to the plain model, bytes included."""
    run_state_machine_as_test(
        walk(method, outliers),
        settings=settings(
            max_examples=walks,
            stateful_step_count=200,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
