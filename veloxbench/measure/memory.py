"""The memory suite: resident bytes of the stored tokens, against the method's own formula, and the peaks.

Each arm runs in a process of its own (``python -m veloxbench.measure.memory`` reads a request on standard
input), so that no arm's buffers or caches of the allocator count for another.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from veloxbench.errors import EngagementError, ExitCode, UsageError, VeloxError
from veloxbench.records.record import Estimate, LayerEngagement

PREFILL_CHUNK = 512
GIB = 2**30


class Request(BaseModel):
    """What a memory process is asked to measure."""

    model_config = ConfigDict(frozen=True)

    model: str
    n_layers: int | None
    method: str
    target: float | None
    parameters: dict[str, Any]
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
    """What a memory process found."""

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
def _resident_peak(found: list[int]) -> Iterator[None]:
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
        found.append(max(peak[0], process.memory_info().rss))


def measure_in_this_process(request: Request) -> Reply:
    """Load, prefill, decode; called in a fresh process."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from veloxbench.inputs.models import load_model, resolve_model
    from veloxbench.measure.account import engagement, static_bytes
    from veloxbench.methods.cache_under_test import arrays_of
    from veloxbench.methods.registry import BuildContext, build, geometry, get_method, make_arm

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
    arm = make_arm(request.method, request.target, **request.parameters)
    method = get_method(request.method)
    context = BuildContext(model, tokenizer, handle.weights_sha256, request.n_layers, request.cache_folder)
    caches, claimed = build(context, arm)
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


def measure(request: Request) -> Reply:
    """Run the request in a process of its own.

    Raises:
        VeloxError: the process failed, with its own exit code, or that of an unfit environment where it was
            killed; its last line of output says why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "veloxbench.measure.memory"],
        input=request.model_dump_json(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        error = VeloxError(f"the memory process of {request.method} failed: {last}")
        known = done.returncode in set(ExitCode)
        error.exit_code = ExitCode(done.returncode) if known else ExitCode.ENVIRONMENT
        raise error
    return Reply.model_validate_json(done.stdout.strip().splitlines()[-1])


def check_formula(layers: Sequence[LayerEngagement], formula_bytes: Sequence[str | None], method: str) -> None:
    """The bytes held by each claimed layer equal the method's formula, exactly.

    Raises:
        EngagementError: they differ; names the layer and both figures.
    """
    for layer, text in zip(layers, formula_bytes, strict=True):
        if text is None:
            continue
        promised = Fraction(text)
        if Fraction(layer.used_bytes) != promised:
            raise EngagementError(
                f"{method} layer {layer.layer}: the arrays hold {layer.used_bytes} bytes for {layer.tokens} tokens, "
                f"its formula says {float(promised)}"
            )


def tokens_in_budget(reply: Reply, budget_bytes: int) -> int:
    """Tokens of one sequence whose caches fit beside the weights, sliding windows holding their share only."""
    room = budget_bytes - reply.weight_bytes - reply.static_bytes
    per_token = [
        8 * layer.used_bytes / max(layer.n_values, 1) * n / 8
        for layer, n in zip(reply.final, reply.n_values_per_token, strict=True)
    ]

    def needed(tokens: int) -> float:
        limits = (tokens if limit is None else min(tokens, limit) for limit in reply.max_tokens)
        return sum(rate * held for rate, held in zip(per_token, limits, strict=True))

    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= room else (low, middle - 1)
    return low


def metrics(reply: Reply, method: str, budget_gib: float) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Metrics and samples of a reply whose bytes agree with the formula.

    Raises:
        EngagementError: from :func:`check_formula`.
    """
    from veloxbench.measure.account import allocated_bits_per_value, bits_per_value

    check_formula(reply.filled, reply.formula_filled, method)
    check_formula(reply.final, reply.formula_final, method)
    load, prefill, decode = reply.phases
    held = sum(layer.allocated_bytes for layer in reply.filled)

    def size(value: float) -> Estimate:
        return Estimate(value=value, unit="bytes")

    found = {
        "bits_per_value": Estimate(value=bits_per_value(reply.final), unit="bits"),
        "allocated_bits_per_value": Estimate(value=allocated_bits_per_value(reply.final), unit="bits"),
        "filled_bits_per_value": Estimate(value=bits_per_value(reply.filled), unit="bits"),
        "filled_allocated_bits_per_value": Estimate(value=allocated_bits_per_value(reply.filled), unit="bits"),
        "static_bytes": size(reply.static_bytes),
        "cache_bytes": size(held),
        "unaccounted_bytes": size(prefill.mlx_active - load.mlx_active - held - reply.static_bytes),
        "weight_bytes": size(reply.weight_bytes),
        "prefill_peak_bytes": size(prefill.mlx_peak - load.mlx_active),
        "decode_peak_bytes": size(decode.mlx_peak - load.mlx_active),
        "process_prefill_peak_bytes": size(prefill.process_peak),
        "process_decode_peak_bytes": size(decode.process_peak),
        "tokens_in_budget": Estimate(value=tokens_in_budget(reply, int(budget_gib * GIB)), unit="tokens"),
        "engaged_layers": Estimate(value=sum(layer.engaged for layer in reply.final), unit="layers"),
    }
    samples = {
        f"{phase.name}_{field}": [float(getattr(phase, field))]
        for phase in reply.phases
        for field in ("mlx_active", "mlx_peak", "process_resident", "process_peak")
    }
    return found, samples


def request_tokens(block: NDArray[np.int32], tokens: int, decode_steps: int) -> list[int]:
    """One sequence of ``tokens + decode_steps`` token ids."""
    if tokens < 1 or decode_steps < 1:
        raise UsageError(f"memory: tokens ({tokens}) and decode_steps ({decode_steps}) must be at least 1")
    return [int(token) for token in block[0, : tokens + decode_steps]]


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
