"""The memory suite: how many bytes the stored tokens take, checked against the method's own formula, and the peaks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction

from pydantic import Field

from veloxbench.errors import EngagementError, ExitCode, VeloxError
from veloxbench.measure.account import allocated_bits_per_value, bits_per_value
from veloxbench.measure.memory_process import Reply, Request
from veloxbench.measure.suite import Bench, Cell, Measured, Measurement, Rates, Suite, Tick, measures
from veloxbench.records.arm import Arm
from veloxbench.records.frozen import Frozen
from veloxbench.records.record import Estimate, LayerEngagement

GIB = 2**30


class MemorySpec(Frozen):
    """Tokens prefilled and decoded in the memory process, and the budget that tokens_in_budget fills."""

    tokens: int = Field(ge=1)
    decode_steps: int = Field(ge=1)
    budget_gib: float = Field(gt=0, allow_inf_nan=False)


def measure(request: Request) -> Reply:
    """Run the request in a process of its own.

    Raises:
        VeloxError: the process failed, with its own exit code, or that of an unfit environment where it was
            killed; its last line of output says why.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "veloxbench.measure.memory_process"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # this process's own packages
        input=request.model_dump_json(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        error = VeloxError(f"the memory process of {request.label} failed: {last}")
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


def tokens_in_budget(reply: Reply, budget_bytes: int, context: int | None = None) -> int | None:
    """Tokens of one sequence whose caches fit beside the weights, sliding windows holding their share only.

    Args:
        context: the model's, which it is bounded by.

    Returns:
        None where memory does not bound it: every layer slides, so that any number of tokens fits.
    """
    room = budget_bytes - reply.weight_bytes - reply.static_bytes
    per_token = [
        8 * layer.used_bytes / max(layer.n_values, 1) * n / 8
        for layer, n in zip(reply.final, reply.n_values_per_token, strict=True)
    ]

    def needed(tokens: int) -> float:
        limits = (tokens if limit is None else min(tokens, limit) for limit in reply.max_tokens)
        return sum(rate * held for rate, held in zip(per_token, limits, strict=True))

    low, high = 0, min(context or 1 << 40, 1 << 40)
    if all(limit is not None or not rate for rate, limit in zip(per_token, reply.max_tokens, strict=True)):
        return None if needed(high) <= room else 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= room else (low, middle - 1)
    return low


def metrics(
    reply: Reply, method: str, budget_gib: float, context: int | None = None
) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Metrics and samples of a reply whose bytes agree with the formula.

    Raises:
        EngagementError: from :func:`check_formula`.
    """
    check_formula(reply.filled, reply.formula_filled, method)
    check_formula(reply.final, reply.formula_final, method)
    load, prefill, decode = reply.phases
    held = sum(layer.allocated_bytes for layer in reply.filled)
    fitting = tokens_in_budget(reply, int(budget_gib * GIB), context)

    def size(value: float) -> Estimate:
        return Estimate(value=value, unit="bytes")

    figures = {
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
        **({} if fitting is None else {"tokens_in_budget": Estimate(value=fitting, unit="tokens")}),
        "engaged_layers": Estimate(value=sum(layer.engaged for layer in reply.final), unit="layers"),
    }
    samples = {
        f"{phase.name}_{field}": [float(getattr(phase, field))]
        for phase in reply.phases
        for field in ("mlx_active", "mlx_peak", "process_resident", "process_peak")
    }
    return figures, samples


@measures
class Memory(Suite):
    """Every arm once, in a process of its own."""

    name = "memory"
    section = "memory"
    tasks = MemorySpec

    def cells(self, tasks: MemorySpec, arms: Sequence[Arm]) -> Iterator[Cell]:
        """One per arm."""
        length = tasks.tokens + tasks.decode_steps
        for arm in arms:
            yield Cell(self.name, "process", tasks, arm, 1, length, length)

    def seconds(self, cell: Cell, rates: Rates) -> float:
        """Starting the process, the prefill and the decode steps."""
        task: MemorySpec = cell.task
        return 6 + cell.slower * (rates.prefix_seconds(task.tokens) + 2 * task.decode_steps * rates.step_seconds)

    def measure(self, item: Measurement, bench: Bench, tick: Tick) -> Measured:
        """Run the arm's process and check its bytes."""
        arm, task = item.cell.arm, item.cell.task
        request = Request(
            **arm.model_dump(),
            model=str(bench.handle.directory),
            n_layers=bench.n_layers,
            cache_folder=bench.context.cache_folder,
            tokens=[int(token) for token in item.block.tokens[0, : item.cell.length]],
            prefill_tokens=task.tokens,
        )
        reply = measure(request)
        return Measured(*metrics(reply, arm.label, task.budget_gib, bench.handle.context), reply.final)
