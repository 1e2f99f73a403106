"""Does an allocation know the model? RateQuant against its own widths dealt at random, and against dearer uniform ones.

A shuffled arm has the same widths on other units: same histogram, same bytes, no knowledge. The claims are
decided on paired differences of KLD, sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from veloxbench.records.intervals import mean_interval
from veloxbench.records.record import Estimate, Record, content_hash
from veloxbench.records.selection import CONTROL, by_machine, is_control
from veloxbench.report.cells import method_alone

METHOD = "ratequant"

Verdict = Literal["better than", "worse than", "undecided against"]


@dataclass(frozen=True)
class Comparison:
    """RateQuant beside one rival on the same tokens.

    Attributes:
        record: RateQuant's.
        rival: what it is compared with.
        rival_bits: the rival's resident bits per value.
        rival_kld: its mean KLD, nats per token.
        worse_by: the rival's KLD minus RateQuant's, paired by sequence: above zero, RateQuant is better.
    """

    record: Record
    rival: str
    rival_bits: float
    rival_kld: float
    worse_by: Estimate

    @property
    def verdict(self) -> Verdict:
        """What the interval allows to say of RateQuant."""
        low, high = self.worse_by.low, self.worse_by.high
        if low is not None and low > 0:
            return "better than"
        if high is not None and high < 0:
            return "worse than"
        return "undecided against"


def comparisons(rows: Sequence[Record]) -> Iterator[Comparison]:
    """Every comparison that the rows allow, within each machine, highest target first.

    Args:
        rows: measured quality of one model and protocol on one text, controls among them.
    """
    for of_machine in by_machine(r for r in rows if "kld_mean" in r.samples and "bits_per_value" in r.metrics).values():
        yield from _comparisons(of_machine)


def _comparisons(measured: Sequence[Record]) -> Iterator[Comparison]:
    ours = [r for r in measured if r.subject.method.name == METHOD and not is_control(r)]
    for record in sorted(ours, key=lambda r: -(r.subject.method.target or 0)):
        controls = [r for r in measured if is_control(r) and _allocation(r) == _allocation(record)]
        if controls:
            yield _against_controls(record, controls)
        for rival in _dearer_uniform(record, measured):
            yield _against(record, rival)


def summary(compared: Sequence[Comparison]) -> str:
    """What was decided about one record, in a sentence without a full stop."""
    phrases = []
    for verdict in get_args(Verdict):
        rivals = [c.rival for c in compared if c.verdict == verdict]
        if rivals:
            phrases.append(f"{verdict} {', '.join(rivals)}")
    return f"{compared[0].record.subject.method.label} is {'; '.join(phrases)}"


def _allocation(record: Record) -> str:
    method = record.subject.method
    return content_hash([method.target, {k: v for k, v in method.parameters.items() if k != CONTROL}])


def _bits(record: Record) -> float:
    return record.metrics["bits_per_value"].value


def _dearer_uniform(record: Record, measured: Sequence[Record]) -> list[Record]:
    """Of every other method the cheapest arm that costs more than the record's, cheapest first."""
    cheapest: dict[str, Record] = {}
    for rival in sorted(measured, key=_bits):
        if rival.subject.method.name != METHOD and _bits(rival) > _bits(record):
            cheapest.setdefault(method_alone(rival), rival)
    return list(cheapest.values())


def _against_controls(record: Record, controls: Sequence[Record]) -> Comparison:
    klds = np.array([control.samples["kld_mean"] for control in controls])
    own = np.array(record.samples["kld_mean"])
    worse = int((klds.mean(axis=1) > own.mean()).sum())
    return Comparison(
        record=record,
        rival=f"mean of {len(controls)} shuffles ({worse} of them worse)",
        rival_bits=max(_bits(control) for control in controls),
        rival_kld=float(klds.mean()),
        worse_by=mean_interval(klds.mean(axis=0) - own, "nats/token"),
    )


def _against(record: Record, rival: Record) -> Comparison:
    own, other = np.array(record.samples["kld_mean"]), np.array(rival.samples["kld_mean"])
    return Comparison(
        record=record,
        rival=rival.subject.method.label,
        rival_bits=_bits(rival),
        rival_kld=rival.metrics["kld_mean"].value,
        worse_by=mean_interval(other - own, "nats/token"),
    )
