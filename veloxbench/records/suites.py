"""The suites as pure data: what each answers, which of its metrics are gated and how, and what may move its numbers.

A suite is three things under one name: its row here, its class in ``measure`` and its table in ``report``. A package
of somebody else's brings the three by the entry point groups ``veloxbench.suites`` (a :class:`SuiteRow`),
``veloxbench.measures`` (a class) and ``veloxbench.tables`` (a function).
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from veloxbench.errors import unknown_name

MovedBy = Literal["rounding", "speed", "counter"]


REDRAW_POSITIONS = 128
"""Scored positions of a sequence at which :attr:`Budget.redraw` was measured."""


@dataclass(frozen=True)
class Budget:
    """How much a metric may grow: the larger of an absolute amount and a share of the baseline.

    Attributes:
        absolute: nats per token.
        relative: share of the baseline's mean.
        redraw: standard deviation of a sequence's difference between two runs that differ in rounding alone, as a
            share of the baseline's mean, at :data:`REDRAW_POSITIONS` scored positions.
        origin: where the figures come from.
    """

    absolute: float
    relative: float
    redraw: float
    origin: str

    def margin(self, baseline: float) -> float:
        """The change up to which the metric passes."""
        return max(self.absolute, self.relative * abs(baseline))


@dataclass(frozen=True)
class SuiteRow:
    """One suite as pure data.

    Attributes:
        name: of the suite; its class in ``measure`` and its table in ``report`` bear the same.
        answers: the question that it answers, for pages and ``--help``.
        moved_by: what of a machine moves its numbers: ``rounding`` (chip, device, BLAS), ``speed`` (the whole machine)
            or ``counter`` (nothing but whether the emulator that counts can run).
        needs_model: whether it reads a model at all.
        exact: metrics that are equal wherever weights, text and settings are; None: every metric and every sample.
        per_sequence: samples of an arm whose paired differences are judged, each with the budget of its growth.
        per_sequence_of_reference: samples of the fp16 reference, which may move neither way by more.
        device_bound: whether exact facts are those of one kind of device (a GPU may divide to another last bit).
        alone: whether a pool measures it only where nothing else of the pool runs: its figures are of the machine.
    """

    name: str
    answers: str
    moved_by: MovedBy
    needs_model: bool = True
    exact: tuple[str, ...] | None = ()
    per_sequence: Mapping[str, Budget] = field(default_factory=dict)
    per_sequence_of_reference: Mapping[str, Budget] = field(default_factory=dict)
    device_bound: bool = False
    alone: bool = False


_OWN = (
    SuiteRow(
        "exact",
        "are codes, bytes and allocations on fixed inputs what they were",
        moved_by="rounding",
        needs_model=False,
        exact=None,
        device_bound=True,
    ),
    SuiteRow(
        "perplexity",
        "how much quality is lost",
        moved_by="rounding",
        exact=("bits_per_value", "allocated_bits_per_value", "engaged_layers"),
        per_sequence={
            "kld_mean": Budget(
                1e-5,
                0.10,
                0.10,
                "relative: what 0.07 bits per value buy (distortion falls fourfold per bit); absolute: 25 x the "
                "measured noise floor of 4e-7 nats (fp16 against fp16 in another batch size)",
            ),
            "delta_nll": Budget(
                0.03,
                0.10,
                0.33,
                "absolute: four standard errors (0.007 nats) of what rounding alone moves the mean of 16 short "
                "sequences; relative: as for kld_mean",
            ),
        },
        per_sequence_of_reference={
            "nll": Budget(
                1e-3,
                0.0,
                2.5e-5,
                "the fp16 reference itself: 0.1% of perplexity, the last digit that published tables print",
            ),
        },
    ),
    SuiteRow(
        "retrieval",
        "does the model still find what was said long ago",
        moved_by="rounding",
        exact=("bits_per_value", "allocated_bits_per_value", "engaged_layers"),
    ),
    SuiteRow(
        "memory",
        "how many bytes are resident",
        moved_by="rounding",
        exact=(
            "bits_per_value",
            "allocated_bits_per_value",
            "filled_bits_per_value",
            "filled_allocated_bits_per_value",
            "cache_bytes",
            "static_bytes",
            "weight_bytes",
            "tokens_in_budget",
            "engaged_layers",
        ),  # peaks are the allocator's, not ours
        alone=True,
    ),
    SuiteRow("holds", "what any cache really keeps in memory, by every array that can be reached", moved_by="rounding"),
    SuiteRow("throughput", "how fast it is", moved_by="speed", alone=True),
    SuiteRow("kernels", "how many bytes fused decode attention moves", moved_by="counter", exact=None),
)


@functools.cache
def all_suites() -> Mapping[str, SuiteRow]:
    """Every suite by name, in the order in which a run measures them and a page shows them.

    Raises:
        ValueError: two suites of one name.
    """
    rows: dict[str, SuiteRow] = {}
    for row in (*_OWN, *(entry.load() for entry in importlib.metadata.entry_points(group="veloxbench.suites"))):
        if row.name in rows:
            raise ValueError(f"suite {row.name!r} is entered twice")
        rows[row.name] = row
    return rows


def suite_row(name: str) -> SuiteRow:
    """The suite of that name.

    Raises:
        UsageError: no such suite; near matches are listed.
    """
    rows = all_suites()
    if name not in rows:
        raise unknown_name("suite", name, rows)
    return rows[name]
