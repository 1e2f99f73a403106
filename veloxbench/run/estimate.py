"""How long measurements should take: three short passes on this machine, and a tick that counts estimated seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from veloxbench.measure.suite import Bench, Measurement, Rates, Tick, get_suite
from veloxbench.measure.throughput import prefill
from veloxbench.records.arm import REFERENCE
from veloxbench.run.progress import Progress

NOTHING = Rates(0.0, 0.0, 0.0)
"""The rates of a plan that reads no model."""


def probed(bench: Bench) -> Rates:
    """Time one batched pass, a few single steps on the reference cache, and one longer prompt."""
    model, caches = bench.model, bench.caches(REFERENCE).caches
    warm = mx.zeros((4, 64), dtype=mx.int32)
    mx.eval(model(warm[:1]))  # weights are read
    start = time.perf_counter()
    mx.eval(model(warm))
    token = (time.perf_counter() - start) / warm.size
    single = mx.zeros((1, 1), dtype=mx.int32)
    mx.eval(model(single, cache=caches))
    start = time.perf_counter()
    for _ in range(3):
        mx.eval(model(single, cache=caches))
    step = (time.perf_counter() - start) / 3
    prompt = np.zeros(512, np.int32)
    took = prefill(model, bench.caches(REFERENCE).caches, prompt).first_token_seconds
    return Rates(token, step, max(took - prompt.size * token, 0.0) / prompt.size**2)


def described(rates: Rates) -> str:
    """The rates in words, for the line that is printed before the run."""
    if rates == NOTHING:
        return "nothing of it reads a model"
    return f"probed: {1 / rates.token_seconds:.0f} tok/s in batches, {1 / rates.step_seconds:.0f} tok/s one by one"


def seconds(item: Measurement, rates: Rates) -> float:
    """Estimated seconds of a measurement."""
    return get_suite(item.cell.suite).seconds(item.cell, rates)


@contextmanager
def ticking(item: Measurement, rates: Rates, progress: Progress) -> Iterator[Tick]:
    """A tick that turns units done into estimated seconds, and settles the rest at the end."""
    total, spent = seconds(item, rates), 0.0
    n_units = get_suite(item.cell.suite).units(item.cell)

    def tick(n: int) -> None:
        nonlocal spent
        if n_units:
            share = min(total * n / n_units, total - spent)
            spent += share
            progress.advance(share)

    yield tick
    progress.advance(total - spent)
