"""Change points: between which two states of the code did a row's stored figures change?

The records of a row on one machine are taken in the order in which they were measured. Where the code of two
neighbours differs, exact facts have changed if they are not equal, and quality has if the gate's paired test says so:
both ways against a margin of zero, under Holm's correction over all tests of all rows. Noise alone marks anything at
all with a probability of at most :data:`~veloxbench.gate.paired_test.ALPHA`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from veloxbench.gate.baselines import gated_metrics
from veloxbench.gate.paired_test import ALPHA, MIN_SEQUENCES, RANDOM_FLIPS, Paired, paired_tests
from veloxbench.records.intervals import CONFIDENCE, holm_levels
from veloxbench.records.record import Record
from veloxbench.records.selection import Machine, machine_of, row_key
from veloxbench.records.suites import all_suites, suite_row

MOST_TESTS = int(ALPHA * RANDOM_FLIPS / 2)
"""More tests than these leave none a level that a sign-flip test of either direction can reach."""

OTHER_ROUNDING = "measured under another rounding, or other versions of the libraries"
NOT_JUDGED = "figures that no gate judges (speeds differ more between two days)"
REFUSED = "refused by the implementation before or after"
UNPAIRED = "KLD without samples of the same sequences"
TOO_FEW = f"KLD of fewer than {MIN_SEQUENCES} sequences"


@dataclass(frozen=True)
class Change:
    """A metric of a row that changed between two records.

    Attributes:
        before: the last record of the earlier code.
        after: the first record of the later code.
        values: the metric before and after; of a metric per sequence the means.
        low: lower end of the change's 95% interval (Student's t over paired sequences); the change itself if exact.
        high: its upper end.
        limit: by how much the gate lets it grow; 0 of an exact fact.
        either_way: whether the gate lets it fall by no more, either: exact facts, and the fp16 reference.
    """

    metric: str
    before: Record
    after: Record
    values: tuple[float, float]
    low: float
    high: float
    limit: float = 0.0
    either_way: bool = True

    @property
    def exact(self) -> bool:
        """Whether the metric is equal wherever nothing changed."""
        return self.low == self.high

    @property
    def is_regression(self) -> bool:
        """Whether the whole interval lies beyond the gate's limit."""
        return self.low > self.limit or (self.either_way and -self.high > self.limit)


@dataclass(frozen=True)
class Changes:
    """What a set of records says of changes, oldest first.

    Attributes:
        compared: pairs of neighbours that were compared.
        tests: metrics per sequence that moved at all: the family of the correction.
        left_out: why other neighbours, or a part of these, were not compared, and how many.
    """

    changes: tuple[Change, ...]
    compared: int
    tests: int
    left_out: Mapping[str, int]


_Pair = tuple[str, Record, Record]
"""A metric per sequence, and the records before and after."""


def change_points(records: Iterable[Record]) -> Changes:
    """The changes between neighbouring records of the same row, machine and rounding whose code differs.

    Of a record's metrics per sequence the first one is tested: an arm's KLD, the reference's NLL. A metric of which no
    sequence moved cannot be called changed by chance, and is no test.
    """
    left_out: Counter[str] = Counter()
    changes: list[Change] = []
    moved: list[_Pair] = []
    compared = 0
    for before, after in _neighbours(records, left_out):
        exact, per_sequence = _gated(after)
        exact = tuple(name for name in exact if name in before.metrics and name in after.metrics)
        judged = [name for name in per_sequence if _is_paired(name, before, after, left_out)]
        compared += bool(exact or judged)
        for name in exact:
            values = before.metrics[name].value, after.metrics[name].value
            if values[0] != values[1]:
                change = values[1] - values[0]
                changes.append(Change(name, before, after, values, change, change))
        moved += [(name, before, after) for name in judged if before.samples[name] != after.samples[name]]
    tested = _tested(moved)
    levels = holm_levels([p_value for _, p_value in tested], ALPHA)
    changes += [change for (change, p_value), level in zip(tested, levels, strict=True) if p_value <= level]
    changes.sort(key=lambda change: change.after.provenance.started)
    return Changes(tuple(changes), compared, len(moved), +left_out)


def _neighbours(records: Iterable[Record], left_out: Counter[str]) -> Iterator[tuple[Record, Record]]:
    """Each record with the one before it of the same row, machine and rounding, where their code differs."""
    rows: dict[tuple[str, Machine], dict[str, Record]] = {}
    for after in sorted(records, key=lambda record: record.provenance.started):
        last = rows.setdefault((row_key(after.subject), machine_of(after)), {})
        before = last.get(after.subject.machine_class)
        last[after.subject.machine_class] = after
        if before is None:
            left_out[OTHER_ROUNDING] += len(last) > 1
        elif _code(before) != _code(after):
            if "unsupported" in (before.status, after.status):
                left_out[REFUSED] += 1
            elif not any(_gated(after)):
                left_out[NOT_JUDGED] += 1
            else:
                yield before, after


def _code(record: Record) -> tuple[str, str]:
    return record.subject.harness, record.subject.method.implementation


def _gated(record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a record's exact metrics, and of the metric per sequence that is tested; none of an unknown suite."""
    if record.subject.suite not in all_suites():
        return (), ()
    return gated_metrics(record, "exact")[0], gated_metrics(record, "quality")[1][:1]


def _is_paired(name: str, before: Record, after: Record, left_out: Counter[str]) -> bool:
    sizes = [len(record.samples.get(name, ())) for record in (before, after)]
    reason = UNPAIRED if sizes[0] != sizes[1] or not sizes[0] else TOO_FEW if sizes[0] < MIN_SEQUENCES else None
    if reason is not None:
        left_out[reason] += 1
    return reason is None


def _tested(pairs: Sequence[_Pair]) -> list[tuple[Change, float]]:
    """Each pair's change with the p-value, both ways, of "nothing changed"; equally many sequences at once."""
    by_size: dict[int, list[_Pair]] = {}
    for name, before, after in pairs:
        by_size.setdefault(len(before.samples[name]), []).append((name, before, after))
    tested = []
    for some in by_size.values():
        then = np.array([before.samples[name] for name, before, _ in some])
        now = np.array([after.samples[name] for name, _, after in some])
        tests = paired_tests(now - then, [0.0] * len(some))
        means = zip(then.mean(axis=1).tolist(), now.mean(axis=1).tolist(), strict=True)
        tested += [_change(*pair, values, test) for pair, values, test in zip(some, means, tests, strict=True)]
    return tested


def _change(
    name: str, before: Record, after: Record, values: tuple[float, float], test: Paired
) -> tuple[Change, float]:
    row = suite_row(after.subject.suite)
    either_way = name in row.per_sequence_of_reference
    budget = (row.per_sequence_of_reference if either_way else row.per_sequence)[name]
    low, high = (test.bound((1 - CONFIDENCE) / 2, sign) for sign in (-1, 1))
    change = Change(name, before, after, values, low, high, budget.margin(values[0]), either_way)
    return change, min(1.0, 2 * min(test.p_regress, test.p_pass))
