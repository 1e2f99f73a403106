"""The retrieval suite: does the model still find what was said long ago.

Perplexity at short range hardly reads old tokens, so it cannot see whether they were coded too coarsely. Three tasks
do: a random sequence that comes twice, facts buried in a text and asked for at its end, a long text scored by depth.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from veloxbench.errors import UsageError
from veloxbench.measure.divergence import PositionStats
from veloxbench.measure.protocol import Chunked
from veloxbench.measure.quality import computed_reference, cost, kept_decoded, reference_rows_of, run_arm, run_reference
from veloxbench.measure.suite import Bench, Cell, Measured, Measurement, Rates, Suite, Tick, measures
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.intervals import finite, mean_interval
from veloxbench.records.record import Estimate, LayerEngagement

Tokens = NDArray[np.int32]
Marks = NDArray[np.bool_]

CHUNK = 64
"""Tokens of a forward pass: as in the chunked protocol, attention reads what the cache stores."""

RECALLED = 0.5
"""A token is recalled where the model gives it more than half of the probability."""

NAMES = ("Amber", "Basil", "Cedar", "Daisy", "Ember", "Fern", "Ginger", "Hazel", "Iris", "Jade", "Lily", "Maple")


@dataclass(frozen=True)
class Laid:
    """A task's tokens, and which of its scored positions count under which name.

    Attributes:
        tokens: ``[S, length + 1]``; the last one is only a target.
        score_from: first scored position.
        marks: by name ``[S, length − score_from]``, no name without a position.
    """

    tokens: Tokens
    score_from: int
    marks: Mapping[str, Marks]


def _checked(task: Repeated | Needles | ByDepth, least: int) -> None:
    if task.sequences < 1:
        raise UsageError(f"{task.name}: sequences is {task.sequences}; it must be at least 1")
    if task.length < least:
        raise UsageError(f"{task.name}: length is {task.length}; it must be at least {least}")


@dataclass(frozen=True)
class Repeated:
    """Tokens of the text in random order, twice: the second time all can be copied, ``length / 2`` tokens back.

    Olsson et al. 2022 (arXiv 2209.11895) measure induction so.
    """

    sequences: int
    length: int
    name: Literal["repeated"] = "repeated"

    def __post_init__(self) -> None:
        _checked(self, 16)
        if self.length % 2:
            raise UsageError(f"repeated: length is {self.length}; it must be even")

    def laid(self, block: Tokens, tokenizer: Any) -> Laid:
        """The first half of each row in random order, twice, and its first token as the last target."""
        half = self.length // 2
        shuffled = np.stack([np.random.default_rng(i).permutation(row[:half]) for i, row in enumerate(block)])
        tokens = np.concatenate([shuffled, shuffled, shuffled[:, :1]], axis=1)
        return Laid(tokens, half, {"copied": np.ones((len(tokens), half), bool)})


@dataclass(frozen=True)
class Needles:
    """Facts buried at depths of the text, each asked for at its end in the words in which it was told.

    The answers' likelihood is scored, so a model need not follow instructions (needles in a haystack, Kamradt 2023).

    Attributes:
        depths: where facts start, as parts of ``length``.
    """

    sequences: int
    length: int
    depths: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.9)
    name: Literal["needles"] = "needles"

    def __post_init__(self) -> None:
        _checked(self, 64 * (len(self.depths) + 1))
        rise = all(a < b for a, b in itertools.pairwise([*self.depths, 1.0]))
        if not (1 <= len(self.depths) <= len(NAMES) and self.depths[0] >= 0 and rise):
            raise UsageError(
                f"needles: depths must be 1 to {len(NAMES)} numbers that rise from 0 on and stay below 1, got "
                f"{list(self.depths)}"
            )

    def laid(self, block: Tokens, tokenizer: Any) -> Laid:
        """Rows of text, a fact at each depth, questions and answers at the end in an order of their own."""

        def encoded(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        tokens, starts, end = block.copy(), [], encoded(".\n")
        answers: list[list[tuple[int, int, int]]] = []
        for row in range(len(block)):
            draw = np.random.default_rng(row)
            names = draw.permutation(NAMES)[: len(self.depths)]
            numbers = [f" {draw.integers(10_000, 100_000)}" for _ in names]
            asked = [encoded(f"\nThe secret number of {name} is") for name in names]
            replies = [encoded(number) for number in numbers]
            facts = [[*question, *reply, *end] for question, reply in zip(asked, replies, strict=True)]
            behind = 1  # column 0 may be a sequence's first token
            for depth, fact in zip(self.depths, facts, strict=True):
                at = max(1, int(depth * self.length))
                if at < behind:
                    raise UsageError(f"needles: {self.length} tokens leave no room between the facts at {self.depths}")
                behind = at + len(fact)
                tokens[row, at:behind] = fact
            order = draw.permutation(len(names))
            tail = [token for i in order for token in facts[i]]
            start = at = self.length + 1 - len(tail)
            if start < behind:
                raise UsageError(f"needles: {self.length} tokens leave no room for the questions behind {self.depths}")
            tokens[row, start:] = tail
            own = []
            for i in order:
                first = at + len(asked[i])
                own.append((int(i), first, first + len(replies[i])))
                at += len(facts[i])
            answers.append(own)
            starts.append(start)
        score_from = min(starts) - 1
        marks = {f"at_{depth:g}": np.zeros((len(block), self.length - score_from), bool) for depth in self.depths}
        by_depth = list(marks.values())
        for row, own in enumerate(answers):
            for i, first, last in own:  # the token at position p is the target of position p − 1
                by_depth[i][row, first - 1 - score_from : last - 1 - score_from] = True
        return Laid(tokens, score_from, marks)


@dataclass(frozen=True)
class ByDepth:
    """Plain text, scored in equal parts from the first token to the last: does the loss grow with depth.

    Attributes:
        parts: of ``length``.
    """

    sequences: int
    length: int
    parts: int = 4
    name: Literal["by depth"] = "by depth"

    def __post_init__(self) -> None:
        _checked(self, 2 * CHUNK)
        if not 1 <= self.parts <= self.length // CHUNK:
            raise UsageError(f"by depth: parts is {self.parts}; it must be within 1..{self.length // CHUNK}")

    def laid(self, block: Tokens, tokenizer: Any) -> Laid:
        """The text as it is."""
        of = np.arange(self.length) * self.parts // self.length
        scored = np.arange(self.length) >= CHUNK
        edges = [self.length * part // self.parts for part in range(self.parts + 1)]
        marks = {
            f"to_{edges[part + 1]}": np.broadcast_to((of == part)[CHUNK:], (len(block), self.length - CHUNK))
            for part in range(self.parts)
            if ((of == part) & scored).any()
        }
        return Laid(block, CHUNK, marks)


Task = Repeated | Needles | ByDepth


def _estimates(marks: Mapping[str, Marks], figures: Mapping[str, NDArray[np.float64]], unit: str) -> Measured:
    """Means over marked positions, all together and by name, the sequence being the unit of intervals."""
    metrics: dict[str, Estimate] = {}
    samples: dict[str, list[float]] = {}
    together = np.any(list(marks.values()), axis=0)
    for name, values in figures.items():
        for mark, where in {"": together, **(marks if len(marks) > 1 else {})}.items():
            key = f"{name}_{mark}" if mark else name
            per_sequence = np.array([row[own].mean() for row, own in zip(values, where, strict=True)])
            metrics[key] = mean_interval(per_sequence, "fraction" if name in ("recalled", "top1_agreement") else unit)
            samples[key] = per_sequence.tolist()
    return Measured(metrics, samples)


def reference_figures(nll: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What the fp16 cache itself finds."""
    return {"nll": finite("nll", nll), "recalled": (np.exp(-nll) > RECALLED).astype(np.float64)}


def arm_figures(stats: PositionStats, reference_nll: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What an arm finds, and how far it is from fp16."""
    nll = finite("nll", stats.nll)
    return {
        "kld_mean": finite("kld", stats.kld_nats),
        "delta_nll": nll - reference_nll,
        "recalled": (stats.target_prob > RECALLED).astype(np.float64),
        "top1_agreement": stats.same_top1.astype(np.float64),
    }


@measures
class Retrieval(Suite):
    """Every arm at every task of the grid, against the same tokens through the fp16 cache."""

    name = "retrieval"
    section = "retrieval"
    tasks = tuple[Annotated[Repeated | Needles | ByDepth, Field(discriminator="name")], ...]

    def cells(self, tasks: Sequence[Task], arms: Sequence[Arm]) -> Iterator[Cell]:
        """One per task and arm."""
        for task in tasks:
            for arm in arms:
                yield Cell(self.name, task.name, task, arm, task.sequences, task.length + 1, task.length)

    def seconds(self, cell: Cell, rates: Rates) -> float:
        """Tokens in batches."""
        return cell.slower * float(cell.task.sequences * cell.task.length) * rates.token_seconds

    def units(self, cell: Cell) -> int:
        """Tokens of all sequences."""
        return int(cell.task.sequences * cell.task.length)

    def measure(self, item: Measurement, bench: Bench, tick: Tick) -> Measured:
        """Lay the task out on the text, feed the arm and compare the positions that count with the reference."""
        laid = item.cell.task.laid(item.block.tokens, bench.context.tokenizer)
        task = Chunked(item.cell.sequences, item.cell.fed, CHUNK, laid.score_from)
        item = dataclasses.replace(
            item,
            cell=dataclasses.replace(item.cell, task=task),
            block=dataclasses.replace(item.block, tokens=laid.tokens),
        )
        arm = kept_decoded(bench.caches(item.cell.arm))
        if item.cell.arm == REFERENCE:
            nll = run_reference(computed_reference(item, bench, arm), len(laid.tokens), tick)
            figures = reference_figures(nll)
        else:
            rows = reference_rows_of(item, bench)
            figures = arm_figures(*run_arm(bench.model, arm, laid.tokens, task, rows, bench.pool, tick))
        made = _estimates(laid.marks, figures, "nats/token")
        layers: list[LayerEngagement] = arm.engagement()
        return Measured({**made.metrics, **cost(layers)}, made.samples, layers)
