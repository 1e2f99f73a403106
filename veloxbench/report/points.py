"""What charts and leaderboards show: each arm's loss with the memory and the speed that belong to it, as flat rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from veloxbench.errors import printable
from veloxbench.records.arm import REFERENCE
from veloxbench.records.quality_words import QualityWord, quality_word
from veloxbench.records.record import Estimate, Record
from veloxbench.records.selection import by_machine, table_rows
from veloxbench.report.cells import format_estimate, hardware_name, machine, paired_ratio, significant
from veloxbench.report.recommend import Footprint, best_quality, fullest_group
from veloxbench.report.tables import GUIDE_CLAIMS, quality_groups

CONTEXTS = tuple(2**power for power in range(9, 18))
"""Tokens of one sequence at which sizes are given: 512 to 131,072."""
QUOTED = 8192
"""Tokens at which pages without a slider give sizes."""
BEST = "each cache's best measurement"
"""The group that holds one measurement of every arm, those of the fullest group first."""
FP16_BITS = 16.0
"""Bits of a value that is not quantized."""
KLD_FLOOR = 1e-4
"""Nats per token; a logarithmic axis ends here, and what loses less is drawn at its end."""
LLOYD_MAX_4_BITS = 0.009501
"""Distortion of the best scalar code of 16 levels on a unit Gaussian (Max 1960)."""


_OF_MEMORY = {"weight_bytes", "static_bytes", "cache_bytes", "prefill_peak_bytes", "decode_peak_bytes"}


@dataclass(frozen=True)
class Point:
    """An arm on one text, with the records that speak of it.

    Attributes:
        quality: None for the reference, which loses nothing.
        memory: of the longest sequence that was measured; None where none was.
        speed: likewise, of the deepest cache.
        place: the machine, where the model's records are of several.
    """

    quality: Record | None
    memory: Record | None
    speed: Record | None
    place: str = ""

    @property
    def record(self) -> Record:
        """The one that names the arm and the model."""
        one = self.quality or self.memory or self.speed
        assert one is not None
        return one

    @property
    def label(self) -> str:
        """The arm's, with the machine where there are several."""
        return self.record.subject.method.label + (f" on {self.place}" if self.place else "")

    @property
    def is_reference(self) -> bool:
        """Whether it is the model's own fp16 cache."""
        return self.record.subject.method.name == REFERENCE.name

    @cached_property
    def footprint(self) -> Footprint | None:
        """Its bytes at any context, tables counted."""
        whole = self.memory is not None and self.memory.metrics.keys() >= _OF_MEMORY and self.memory.engagement
        return Footprint(self.memory) if self.memory is not None and whole else None

    @property
    def word(self) -> QualityWord | None:
        """The verdict's."""
        return None if self.quality is None else quality_word(self.quality.metrics)

    def metric(self, name: str) -> Estimate | None:
        """A figure of quality."""
        return None if self.quality is None else self.quality.metrics.get(name)

    @property
    def bits(self) -> float:
        """Bits a value as the tokens of the measurement were held, tables that do not grow left out."""
        return self.record.metrics["bits_per_value"].value if "bits_per_value" in self.record.metrics else FP16_BITS

    @property
    def resident(self) -> float:
        """Bits a value of the tokens alone, in the longest sequence that was measured."""
        longest = self.memory or self.record
        return longest.metrics["bits_per_value"].value if "bits_per_value" in longest.metrics else self.bits

    def all_in(self, context: int) -> float:
        """Bits a value at a context, with tables where their size is known."""
        return self.bits if self.footprint is None else self.footprint.bits(context)

    @property
    def speed_ratio(self) -> Estimate | None:
        """Decode speed over fp16's."""
        if self.speed is None or "decode_speed_ratio" not in self.speed.metrics:
            return None
        return paired_ratio(self.speed, "decode_speed_ratio")[0]


def points(records: Sequence[Record]) -> dict[str, list[Point]]:
    """Every arm of a model by group of quality records; the first group has each arm's best measurement.

    Args:
        records: of one model; those of each machine are points of their own.
    """
    machines = by_machine(record for record in table_rows(records) if record.status == "measured")
    groups: dict[str, list[Point]] = {BEST: []}
    for measured in machines.values():
        place = hardware_name(measured[0]) if len(machines) > 1 else ""
        for title, of_group in _points(measured, place).items():
            groups.setdefault(title, []).extend(of_group)
    return groups


def _points(measured: Sequence[Record], place: str) -> dict[str, list[Point]]:
    """Those of one machine."""
    fullest = fullest_group(filter(_is_evaluated, measured))
    by_label: dict[str, list[Record]] = {}
    for record in measured:
        if record.subject.suite != "kernels":
            by_label.setdefault(record.subject.method.label, []).append(record)
    best = {label: best_quality(filter(_is_evaluated, of_arm), fullest) for label, of_arm in by_label.items()}
    sizes = {
        label: (_largest(of_arm, "memory", "tokens"), _largest(of_arm, "throughput", "depth"))
        for label, of_arm in by_label.items()
    }
    by_group = {BEST: best} | {
        title: {record.subject.method.label: record for record in rows if quality_word(record.metrics) is not None}
        for title, rows in quality_groups(measured).items()
    }

    return {
        title: [
            Point(of_group.get(label), memory, speed, place)
            for label, (memory, speed) in sizes.items()
            if of_group.get(label) is not None or (label == REFERENCE.name and memory)
        ]
        for title, of_group in by_group.items()
    }


def _is_evaluated(record: Record) -> bool:
    return "calibration" not in record.subject.text.name


def _largest(records: Sequence[Record], suite: str, setting: str) -> Record | None:
    of_suite = [record for record in records if record.subject.suite == suite]
    return max(of_suite, key=lambda record: float(str(record.subject.settings.get(setting, 0))), default=None)


def rows(model: str, by_group: Mapping[str, Sequence[Point]]) -> Iterator[dict[str, Any]]:
    """A model's points, claims and bound as flat rows for charts; texts are such as a reader may see.

    A row's ``kind`` is ``arm``, ``claim`` or ``bound``; lists have an entry for each of :data:`CONTEXTS`.
    """
    for group, of_group in by_group.items():
        reference = next((point.footprint for point in of_group if point.is_reference), None)
        values = None if reference is None else [reference.values(context) for context in CONTEXTS]
        shared = {"model": printable(model), "group": printable(group)}
        for point in of_group:
            yield {**shared, **_arm(point, values), "front": not any(_beats(other, point) for other in of_group)}
        for row in (*_claims(of_group), *_bound(of_group)):
            bits = row["bits"]
            sizes = None if values is None else [bits / 8 * n / 1e6 for n in values]
            yield {**shared, **row, "bits_at": [bits] * len(CONTEXTS), "mb_at": sizes}


def _beats(other: Point, point: Point) -> bool:
    """Whether it is as small and loses as little, and is better in one of both."""
    ours, theirs = ((each.all_in(QUOTED), _drawn(each.metric("kld_mean"))["kld"]) for each in (point, other))
    return theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]


def _arm(point: Point, values: Sequence[float] | None) -> dict[str, Any]:
    method, footprint = point.record.subject.method, point.footprint
    kld, ratio, word = point.metric("kld_mean"), point.speed_ratio, point.word
    if footprint is not None:
        sizes: list[float] | None = [footprint.all_in(context) / 1e6 for context in CONTEXTS]
    else:
        sizes = None if values is None else [point.bits / 8 * n / 1e6 for n in values]
    drawn = _drawn(kld)
    return {
        "kind": "arm",
        "arm": printable(point.label),
        "method": printable(method.name),
        "series": printable(method.at_any_target.label),
        "tag": "fp16" if point.is_reference else "" if method.target is None else f"{method.target:g}",
        "target": method.target,
        "bits": point.bits,
        "bits_at": [point.all_in(context) for context in CONTEXTS],
        "mb_at": sizes,
        "need_at": None
        if footprint is None
        else [(footprint.weights + footprint.peak(context)) / 1e9 for context in CONTEXTS],
        "counted": footprint is not None,
        "tables": "counted" if footprint is not None else "not measured",
        **drawn,
        "kld_text": "" if kld is None else format_estimate(kld),
        "p99_text": _text(point.metric("kld_p99")),
        "top1_text": _text(point.metric("top1_agreement")),
        "ppl_text": _text(point.metric("delta_ppl")),
        "speed": None if ratio is None else ratio.value,
        "speed_low": None if ratio is None else ratio.low,
        "speed_high": None if ratio is None else ratio.high,
        "speed_text": "" if ratio is None else format_estimate(ratio),
        "verdict": "" if word is None else word.word,
        "record": point.record.id[:12],
        "machine": printable(machine(point.record)),
    }


def _text(estimate: Estimate | None) -> str:
    return "" if estimate is None else format_estimate(estimate)


def _drawn(kld: Estimate | None) -> dict[str, float]:
    """Where a loss and its interval stand on the logarithmic axis."""
    if kld is None:
        return {"kld": KLD_FLOOR, "low": KLD_FLOOR, "high": KLD_FLOOR}
    ends = (kld.value, kld.value if kld.low is None else kld.low, kld.value if kld.high is None else kld.high)
    return dict(zip(("kld", "low", "high"), (max(KLD_FLOOR, end) for end in ends), strict=True))


def _claims(of_group: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """What the guide claims, as nats: a change of perplexity is one of the mean NLL, by this model's own perplexity."""
    estimates = [(point.metric("ppl"), point.metric("delta_ppl")) for point in of_group]
    base = next((ppl.value - delta.value for ppl, delta in estimates if ppl and delta), None)
    if base is None:
        return
    for target, claim in GUIDE_CLAIMS.items():
        low, high = (math.log1p(change / base) for change in (claim.low, claim.high))
        yield {
            "kind": "claim",
            "bits": target,
            "low": max(KLD_FLOOR, low),
            "high": max(KLD_FLOOR, high),
            "kld": max(KLD_FLOOR, high),
            "arm": f"the guide's claim at {target:g} bits: ΔPPL {claim.delta_ppl}, ΔNLL {significant(high)} at most",
        }


def _bound(of_group: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Shannon's bound for Gaussian values that all count alike, 2^-2R, in units of what TurboQuant's 4 bits lose."""
    anchor = next((point.metric("kld_mean") for point in of_group if point.label == "turboquant_mse@4"), None)
    if anchor is None:
        return
    for bits in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
        kld = anchor.value * 4.0**-bits / LLOYD_MAX_4_BITS
        yield {"kind": "bound", "bits": bits, "kld": max(KLD_FLOOR, kld), "arm": "Shannon's bound without weights"}
