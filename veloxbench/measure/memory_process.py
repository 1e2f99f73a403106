"""The process in which the memory suite measures one arm, so that no arm's buffers count for another.

``python -m veloxbench.measure.memory_process`` reads a :class:`Request` on standard input and prints a :class:`Reply`.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import BaseModel

from veloxbench.errors import VeloxError
from veloxbench.records.arm import Arm
from veloxbench.records.record import LayerEngagement

PREFILL_CHUNK = 512


class Request(Arm):
    """What a memory process is asked to measure: an arm, on a model, with these tokens."""

    model: str
    n_layers: int | None
    cache_folder: Path
    tokens: list[int]
    prefill_tokens: int


class Phase(BaseModel):
    """One phase's memory, in bytes. ``peak`` figures are over the phase, ``active`` at its end."""

    name: str
    mlx_active: int
    mlx_peak: int
    process_resident: int
    process_peak: int


class Reply(BaseModel):
    """What a memory process measured."""

    phases: list[Phase]
    filled: list[LayerEngagement]
    """After the prefill: the buffers are as full as the depth makes them."""
    final: list[LayerEngagement]
    """After the decode steps."""
    formula_filled: list[str | None]
    """Bytes of each claimed layer by the method's formula, as exact fractions, after the prefill."""
    formula_final: list[str | None]
    """The same after the decode steps."""
    max_tokens: list[int | None]
    """Tokens that a layer holds at most (a sliding window), if it has such a limit."""
    n_values_per_token: list[int]
    static_bytes: int
    weight_bytes: int


@contextmanager
def _resident_peak(peaks: list[int]) -> Iterator[None]:
    """Append the highest resident size of this process while the block runs, sampled every 2 ms."""
    process, stop, peak = psutil.Process(), threading.Event(), [psutil.Process().memory_info().rss]

    def sample() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        peaks.append(max(peak[0], process.memory_info().rss))


def measure_in_this_process(request: Request) -> Reply:
    """Load, prefill, decode; called in a fresh process."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from veloxbench.inputs.models import load_model, resolve_model
    from veloxbench.measure.account import engagement, static_bytes
    from veloxbench.methods.cache_under_test import arrays_of
    from veloxbench.methods.registry import BuildContext, build, checked, geometry, get_method

    phases: list[Phase] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        peaks: list[int] = []
        with _resident_peak(peaks):
            yield
            mx.synchronize()
        # reset_peak_memory() starts from zero, not from what is active
        active = mx.get_active_memory()
        phases.append(
            Phase(
                name=name,
                mlx_active=active,
                mlx_peak=max(mx.get_peak_memory(), active),
                process_resident=psutil.Process().memory_info().rss,
                process_peak=peaks[0],
            )
        )

    handle = resolve_model(request.model)
    with phase("load"):
        model, tokenizer = load_model(handle, n_layers=request.n_layers)
        weights: Any = tree_flatten(model.parameters())  # type: ignore[no-untyped-call]
        mx.eval([array for _, array in weights])
    method = get_method(request.name)
    context = BuildContext(model, tokenizer, handle.weights_sha256, request.n_layers, request.cache_folder)
    caches, claimed = build(context, checked(request.alone))
    shapes = geometry(caches, model)
    tokens = np.array(request.tokens, dtype=np.int32)
    with phase("prefill"):
        for start in range(0, request.prefill_tokens, PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, request.prefill_tokens)
            model(mx.array(tokens[None, start:stop]), cache=caches)
            mx.eval([arrays_of(cache) for cache in caches])
        static = static_bytes(caches)  # counting makes the tables that only later steps read: they are in the phase

    def formulas(fed: int) -> list[str | None]:
        rows = zip(caches, claimed, shapes, strict=True)
        return [str(method.formula(c.inner, fed, shape)) if claim and shape else None for c, claim, shape in rows]

    filled = engagement(caches, claimed, method.cache_classes)
    formula_filled = formulas(request.prefill_tokens)  # now: it may ask the cache what the data decided
    with phase("decode"):
        for token in tokens[request.prefill_tokens :]:
            logits = model(mx.array([[int(token)]]), cache=caches)
            mx.eval(logits, [arrays_of(cache) for cache in caches])
        del logits
    return Reply(
        phases=phases,
        filled=filled,
        final=engagement(caches, claimed, method.cache_classes),
        formula_filled=formula_filled,
        formula_final=formulas(len(tokens)),
        max_tokens=[getattr(cache.inner, "max_size", None) for cache in caches],
        n_values_per_token=[cache.n_values_per_token for cache in caches],
        static_bytes=static,
        weight_bytes=sum(array.nbytes for _, array in weights),
    )


def _main() -> int:
    try:
        reply = measure_in_this_process(Request.model_validate_json(sys.stdin.buffer.read()))
    except VeloxError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    print(json.dumps(reply.model_dump(mode="json")))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
