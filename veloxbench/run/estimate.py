"""How long a measurement should take, from three short passes on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from veloxbench.measure import exact, kernels, throughput
from veloxbench.measure.protocol import Chunked, Decode
from veloxbench.run.grid import MemorySpec
from veloxbench.run.plan import REFERENCE, Measurement
from veloxbench.run.progress import Progress


@dataclass(frozen=True)
class Rates:
    """This machine's speed on this model, from three short passes: for the estimate only.

    Attributes:
        token_seconds: of a token in a batch of short sequences.
        step_seconds: of a decode step.
        attention_seconds: what each pair of tokens of one long prompt adds (MLX's attention on a processor).
    """

    token_seconds: float
    step_seconds: float
    attention_seconds: float

    def prefix_seconds(self, tokens: int) -> float:
        """Estimated seconds of one prompt through fp16 caches."""
        return tokens * self.token_seconds + tokens**2 * self.attention_seconds

    def describe(self) -> str:
        """For the line printed before the run."""
        return f"probed: {1 / self.token_seconds:.0f} tok/s in batches, {1 / self.step_seconds:.0f} tok/s one by one"

    def seconds(self, item: Measurement) -> float:
        """Estimated seconds of a measurement; a quantized cache is assumed to cost half as much again."""
        slower = 1.0 if item.arm == REFERENCE else 1.5
        match item.task:
            case kernels.Traffic():
                return 8.0  # compiling two bodies, then a second
            case exact.FixedInputs():
                return 0.1
            case Chunked() as task:
                return slower * task.sequences * task.length * self.token_seconds
            case Decode() as task:
                batched = task.sequences * task.prefix * self.token_seconds
                return slower * (batched + task.steps * (self.step_seconds + task.sequences * self.token_seconds))
            case throughput.Timing() as task:
                prefills = task.prefill_pairs * (1 + slower) * self.prefix_seconds(task.depth)
                return prefills + task.pairs * (1 + 3 * slower) * (task.steps + 1) * self.step_seconds
            case MemorySpec() as task:
                return 6 + slower * (self.prefix_seconds(task.tokens) + 2 * task.decode_steps * self.step_seconds)

    @contextmanager
    def ticking(self, item: Measurement, progress: Progress) -> Iterator[Callable[[int], None]]:
        """A tick that turns tokens done into estimated seconds, and settles the rest at the end."""
        total, spent = self.seconds(item), 0.0
        units = {Chunked: "n_scored", Decode: "n_scored"}.get(type(item.task))
        n_units = item.task.sequences * getattr(item.task, units) if units else 0  # type: ignore[union-attr]

        def tick(n: int) -> None:
            nonlocal spent
            if n_units:
                share = min(total * n / n_units, total - spent)
                spent += share
                progress.advance(share)

        yield tick
        progress.advance(total - spent)
