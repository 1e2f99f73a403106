"""Trying travelled baselines: how often the quality gate is wrong where only the rounding differs.

One state of the code was measured under several settings of one machine's BLAS. Each setting's samples serve as the
baseline of each other's, in gates whose sequences are drawn from the measured ones with replacement: a difference
between the two sides is noise that rounding drew anew. Where damage is to be noticed, the second side loses more: by a
share of its own loss, or by what a damage of :mod:`veloxbench.trials.damages` was measured to cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veloxbench.errors import IntegrityError
from veloxbench.gate.baselines import from_records
from veloxbench.gate.gate import judge
from veloxbench.gate.verdicts import Verdict, overall
from veloxbench.records.frozen import Frozen
from veloxbench.records.journal import parsed, read_content
from veloxbench.records.record import Estimate, Finite, Record
from veloxbench.records.selection import read_last_run
from veloxbench.trials.damaged import DAMAGES
from veloxbench.trials.damages import Measured, Study, record_of
from veloxbench.trials.timing_resample import Rate

STRUCK: Final = "turboquant_mse@4"
"""The arm that is damaged; the others of the gate differ by rounding alone."""
LOSSES: Final = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Shares by which the damaged arm's loss grows."""

Samples = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""By arm and metric, a figure per sequence."""


class Settings(Measured):
    """What was measured under each setting, with equal code.

    Attributes:
        samples: by setting, arm and metric a figure per sequence.
    """

    implementation: str
    samples: dict[str, dict[str, dict[str, list[Finite]]]]


class Outcomes(Frozen):
    """How gates of one kind ended.

    Attributes:
        kind: "equal", "scaled" or "damage".
        what: what differs between the sides beside the rounding.
    """

    kind: str
    what: str
    regress: Rate
    passed: Rate
    inconclusive: Rate


class ErrorRates(Frozen):
    """The measured settings, and how gates between them ended."""

    settings: Settings
    measured_gates: dict[str, Verdict]
    drawn: tuple[Outcomes, ...]


def read_rates(path: Path) -> ErrorRates:
    """The record of a trial.

    Raises:
        IntegrityError: the file is none, or cannot be read.
    """
    return parsed(read_content(path), ErrorRates.model_validate_json, str(path), "a record of travelled baselines")


def taken(folders: Mapping[str, Path]) -> Settings:
    """The settings' samples from the folders of their runs.

    Raises:
        IntegrityError: the runs are not of equal code, model, text and protocol.
    """
    by_setting = {name: _quality(read_last_run(folder)) for name, folder in folders.items()}
    first = next(iter(by_setting.values()))
    for name, records in by_setting.items():
        if [_unmoved(record) for record in records] != [_unmoved(record) for record in first]:
            raise IntegrityError(
                f"{folders[name]} holds other code, inputs or arms than {next(iter(folders.values()))}"
            )
    subject, made = first[-1].subject, first[-1].provenance
    return Settings(
        model=subject.model,
        text=subject.text,
        protocol={name: v for name, v in subject.settings.items() if isinstance(v, (int, str))},
        measured=made.started,
        versions=made.versions,
        hardware=made.hardware,
        implementation=subject.method.implementation,
        samples={name: {r.subject.method.label: _gated(r) for r in records} for name, records in by_setting.items()},
    )


def _quality(records: list[Record]) -> list[Record]:
    return sorted((r for r in records if r.subject.suite == "perplexity"), key=lambda r: r.subject.method.label)


def _unmoved(record: Record) -> object:
    return record.subject.model_copy(update={"machine_class": ""})


def _gated(record: Record) -> dict[str, list[float]]:
    names = ("kld_mean", "delta_nll") if "kld_mean" in record.samples else ("nll",)
    return {name: list(record.samples[name]) for name in names}


def error_rates(settings: Settings, study: Study, gates: int, seed: int) -> ErrorRates:
    """Gates between every two settings, in both directions, drawn and as measured.

    Args:
        study: damages, whose measured cost is added to the struck arm.
        gates: drawn gates of each kind, dealt to the pairs of settings in turn.
        seed: of the draws.
    """
    sides: dict[str, Samples] = {
        name: {arm: {m: np.asarray(x) for m, x in metrics.items()} for arm, metrics in arms.items()}
        for name, arms in settings.samples.items()
    }
    pairs = list(itertools.permutations(sides, 2))
    chance, n = np.random.default_rng(seed), int(settings.protocol["sequences"])
    kinds: list[tuple[str, str, Change]] = [("equal", "nothing", lambda before, after, chance: after)]
    kinds += [("scaled", f"loss {share:.0%} larger", _scaled(share)) for share in LOSSES]
    kinds += [
        ("damage", damage.summary, _as_in(study, damage.base, damage.name))
        for damage in DAMAGES
        if damage.base == "plain" and damage.harmful
    ]
    drawn = []
    for kind, what, change in kinds:
        ends = []
        for i in range(gates):
            before, after = (sides[name] for name in pairs[i % len(pairs)])
            rows = chance.integers(0, n, n)
            before, after = (_taken_rows(side, rows) for side in (before, after))
            ends.append(_verdict(settings, before, change(before, after, chance)))
        rates = {verdict: Rate.of(ends.count(verdict), gates) for verdict in Verdict}
        drawn.append(
            Outcomes(
                kind=kind,
                what=what,
                regress=rates[Verdict.REGRESS],
                passed=rates[Verdict.PASS],
                inconclusive=rates[Verdict.INCONCLUSIVE],
            )
        )
    measured = {f"{one}, judged by {other}": _verdict(settings, sides[other], sides[one]) for other, one in pairs}
    return ErrorRates(settings=settings, measured_gates=measured, drawn=tuple(drawn))


Change = Callable[[Samples, Samples, np.random.Generator], Samples]


def _scaled(share: float) -> Change:
    def change(before: Samples, after: Samples, _: np.random.Generator) -> Samples:
        struck = {metric: x + share * before[STRUCK][metric] for metric, x in after[STRUCK].items()}
        return {**after, STRUCK: struck}

    return change


def _as_in(study: Study, base: str, name: str) -> Change:
    """What a damage was measured to cost, of sequences drawn at random: its own draw of noise comes on top."""
    pairs = list(zip(study.samples[base], study.samples[name], strict=True))
    cost = {
        metric: np.concatenate(
            [np.subtract(getattr(head, metric), getattr(undamaged, metric)) for undamaged, head in pairs]
        )
        for metric in ("kld_mean", "delta_nll")
    }

    def change(_: Samples, after: Samples, chance: np.random.Generator) -> Samples:
        rows = chance.integers(0, len(cost["kld_mean"]), len(after[STRUCK]["kld_mean"]))
        return {**after, STRUCK: {metric: x + cost[metric][rows] for metric, x in after[STRUCK].items()}}

    return change


def _taken_rows(side: Samples, rows: NDArray[np.int64]) -> Samples:
    return {arm: {metric: x[rows] for metric, x in metrics.items()} for arm, metrics in side.items()}


def _verdict(settings: Settings, before: Samples, after: Samples) -> Verdict:
    base, head = (
        [
            record_of(settings, "perplexity", arm, _means(metrics), {m: x.tolist() for m, x in metrics.items()})
            for arm, metrics in side.items()
        ]
        for side in (before, after)
    )
    findings = judge(head, from_records(base, "another setting"), profile="compared", today=settings.measured.date())
    return overall([finding for finding in findings if finding.tier == "quality"])


def _means(metrics: Mapping[str, NDArray[np.float64]]) -> dict[str, Estimate]:
    return {metric: Estimate(value=float(x.mean()), unit="nats/token") for metric, x in metrics.items()}
