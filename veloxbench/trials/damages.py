"""Trying the quality gate: real damage, its true size, and what the gate says of it.

Every damage of :mod:`veloxbench.trials.damaged` runs on the same sequences as its undamaged base. All of them
together give the true change; the sequences dealt to one of four hands are one gate of the size that CI runs. Only
samples are measured and kept: verdicts are computed from them by the gate's own code whenever the page is written.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from veloxbench.errors import IntegrityError
from veloxbench.gate.baselines import from_records
from veloxbench.gate.gate import judge
from veloxbench.gate.paired_test import smallest_detectable
from veloxbench.gate.verdicts import Finding, Verdict, overall
from veloxbench.inputs.corpora import TokenBlock, load_text, token_block
from veloxbench.inputs.models import ModelHandle, load_model
from veloxbench.inputs.transfer_progress import Reporter
from veloxbench.measure import exact, machine
from veloxbench.measure.divergence import ReferenceRows, worker_pool
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.measure.quality import arm_metrics, run_arm
from veloxbench.measure.reference import lockstep
from veloxbench.measure.suite import ArmCaches
from veloxbench.methods.cache_under_test import CacheUnderTest
from veloxbench.methods.veloxquant import implementation
from veloxbench.records import provenance
from veloxbench.records.frozen import Frozen
from veloxbench.records.intervals import mean_interval
from veloxbench.records.journal import append_line, cut_torn_tail, parsed, read_content, write_text
from veloxbench.records.record import Estimate, Finite, MethodRef, ModelRef, Provenance, Record, Subject, TextRef
from veloxbench.records.suites import suite_row
from veloxbench.run.plan import model_ref
from veloxbench.trials.damaged import (
    BASES,
    CACHE_CLASS,
    DAMAGES,
    STRUCK,
    Damage,
    damaged_caches,
    exact_case,
    strikes,
    undamaged,
)

_GATED: Final = suite_row("perplexity").per_sequence

GATES: Final = 4
"""Gates that the measured sequences are dealt to, one sequence to each in turn, so that each spans the text."""


class Samples(Frozen):
    """One configuration on one gate's sequences: a figure per sequence."""

    kld_mean: list[Finite]
    delta_nll: list[Finite]
    bits_per_value: Finite
    implementation: str = Field(description="hash of the source that was measured")


class Measured(Frozen):
    """On what a trial measured its samples, and where."""

    model: ModelRef
    text: TextRef
    protocol: dict[str, int | str]
    measured: datetime
    versions: dict[str, str]
    hardware: dict[str, JsonValue]


class Study(Measured):
    """What was measured, on what."""

    samples: dict[str, tuple[Samples, ...]] = Field(description="of every base and every damage, one entry per gate")


def arms() -> dict[str, tuple[str, Any]]:
    """Base configuration and change of every base and every damage, by name."""
    bases = {name: (name, undamaged) for name in BASES}
    return bases | {damage.name: (damage.base, damage.change) for damage in DAMAGES}


def measure(handle: ModelHandle, corpus: str, protocol: Chunked, journal: Path, reporter: Reporter) -> Study:
    """Measure every base and damage on ``GATES`` times the protocol's sequences.

    What the journal has is not measured again, whatever the implementation was then; the control "again" shows
    whether the bases are still what they were.

    Args:
        protocol: the gate's own, with the sequences of one gate.
        journal: finished parts, one a line.
    """
    model, tokenizer = load_model(handle)
    text = load_text(corpus, "evaluation", reporter=reporter)
    block = token_block(text, tokenizer, n_sequences=GATES * protocol.sequences, length=protocol.n_tokens + 1)
    head = measured_on(handle, block, protocol)
    done = _read_journal(journal, head)
    with worker_pool() as pool:
        for gate in range(GATES):
            missing = [name for name in arms() if (name, gate) not in done]
            if not missing:
                continue
            tokens = block.tokens[gate::GATES]
            reference = list(_reference(model, tokens, protocol, pool))
            for name in missing:
                caches = damaged_caches(model, *arms()[name])
                done[name, gate] = _samples(model, caches, tokens, protocol, reference, pool)
                line = {"arm": name, "gate": gate, "samples": done[name, gate].model_dump()}
                append_line(journal, json.dumps(line) + "\n")
                reporter.message(f"gate {gate + 1} of {GATES}: {name}")
            del reference
            gc.collect()
    samples = {name: [done[name, gate] for gate in range(GATES)] for name in arms()}
    return Study.model_validate({**head, "measured": datetime.now(UTC), "samples": samples})


def measured_on(handle: ModelHandle, block: TokenBlock, protocol: Chunked) -> dict[str, Any]:
    """What :class:`Measured` holds beside the date, of a measurement here and now."""
    return {
        "model": model_ref(handle, None).model_dump(exclude={"n_layers"}),
        "text": {"name": block.text, "tokens_sha256": block.sha256},
        "protocol": dataclasses.asdict(protocol),
        "versions": provenance.versions(),
        "hardware": machine.hardware(),
    }


def read_study(path: Path) -> Study:
    """A study that was measured.

    Raises:
        IntegrityError: the file is no study, or cannot be read.
    """
    return parsed(read_content(path), Study.model_validate_json, str(path), "a study of damages")


def journal_of(study: Study) -> str:
    """The journal that would end in this study: to measure only what it lacks."""
    head = study.model_dump(mode="json", include={"model", "text", "protocol", "versions", "hardware"})
    head["model"].pop("n_layers")
    lines = [
        {"arm": name, "gate": gate, "samples": samples.model_dump()}
        for name, of_arm in study.samples.items()
        for gate, samples in enumerate(of_arm)
    ]
    return "".join(json.dumps(line) + "\n" for line in [head, *lines])


def _read_journal(journal: Path, head: dict[str, Any]) -> dict[tuple[str, int], Samples]:
    if journal.exists():
        cut_torn_tail(journal)
    content = read_content(journal) if journal.exists() else b""
    try:
        parts = [json.loads(line) for line in content.splitlines()]
        if not parts or parts[0] != head:  # of something else: nothing of it can be used
            write_text(journal, json.dumps(head) + "\n")
            return {}
        return {(part["arm"], part["gate"]): Samples.model_validate(part["samples"]) for part in parts[1:]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(f"{journal} is damaged ({error}); delete it, and it is measured anew") from error


def _reference(
    model: Module, tokens: NDArray[np.int32], protocol: Chunked, pool: ThreadPoolExecutor
) -> Iterator[ReferenceRows]:
    caches = [CacheUnderTest(cache) for cache in make_prompt_cache(model)]
    return lockstep(feed(model, caches, tokens, protocol), pool)


def _samples(
    model: Module,
    caches: list[Any],
    tokens: NDArray[np.int32],
    protocol: Chunked,
    reference: list[ReferenceRows],
    pool: ThreadPoolExecutor,
) -> Samples:
    arm = ArmCaches([CacheUnderTest(cache) for cache in caches], [True] * len(caches), (CACHE_CLASS,))
    stats, nll = run_arm(model, arm, tokens, protocol, iter(reference), pool, lambda _: None)
    measured = arm_metrics(stats, nll, arm.engagement())
    return Samples(
        kld_mean=measured.samples["kld_mean"],
        delta_nll=measured.samples["delta_nll"],
        bits_per_value=measured.metrics["bits_per_value"].value,
        implementation=implementation(),
    )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A damage, its true size, and what the gates said.

    Attributes:
        true: mean change of the KLD per token over all sequences, with its interval.
        share: of the base's KLD.
        spread: standard deviation over sequences of the change.
        gates: the quality tier's verdict of each gate.
        pooled: that of one gate on all sequences.
        exact: what the exact tier sees: the changed bytes of the real run and the changed metrics of its suite.
    """

    damage: Damage
    true: Estimate
    share: float
    spread: float
    gates: tuple[Verdict, ...]
    pooled: Verdict
    exact: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Reach:
    """What gates on a base can detect, in nats of KLD per token.

    Attributes:
        kld: the base's mean.
        spread: median over its damages of :attr:`Trial.spread`.
        per_gate: smallest detectable change of a gate, the largest of the gates; None where there is none.
        pooled: that of one gate on all sequences.
    """

    kld: float
    spread: float
    per_gate: float | None
    pooled: float | None


def trials(study: Study, n_arms: int) -> list[Trial]:
    """Every damage judged.

    Args:
        study: what was measured.
        n_arms: arms in the gate's profile: the others are unchanged, and count in the correction for many tests.
    """
    judged = []
    for damage in DAMAGES:
        base, head = study.samples[damage.base], study.samples[damage.name]
        change = _klds(head) - _klds(base)
        findings = [_judged(study, damage.base, *pair, n_arms) for pair in zip(base, head, strict=True)]
        bytes_changed = {f.metric: None for f in findings[0] if f.tier == "exact" and not f.passed}
        judged.append(
            Trial(
                damage=damage,
                true=mean_interval(change, "nats/token"),
                share=float(change.mean() / _klds(base).mean()),
                spread=float(change.std(ddof=1)),
                gates=tuple(_quality_verdict(of_gate) for of_gate in findings),
                pooled=_quality_verdict(_judged(study, damage.base, _pooled(base), _pooled(head), n_arms)),
                exact=(*bytes_changed, *exact_changes(study, damage)),
            )
        )
    return judged


def reaches(study: Study, judged: Sequence[Trial], n_arms: int) -> dict[str, Reach]:
    """What the gates can detect on each base that was damaged."""
    damaged = {trial.damage.base for trial in judged}
    return {base: reach(study, base, judged, n_arms) for base in BASES if base in damaged}


def reach(study: Study, base: str, judged: Sequence[Trial], n_arms: int) -> Reach:
    """What the gates can detect on a base, given how far any change of codes moves single sequences."""
    spread = float(np.median([trial.spread for trial in judged if trial.damage.base == base and trial.spread > 0]))
    margin = _GATED["kld_mean"].margin(float(_klds(study.samples[base]).mean()))
    n_tests = 2 * len(_GATED) * n_arms  # of regression and of drift, each metric of each arm

    def detectable(klds: Sequence[float]) -> float | None:
        return smallest_detectable(klds, margin, n_tests, spread)

    gates = [detectable(samples.kld_mean) for samples in study.samples[base]]
    known = [change for change in gates if change is not None]
    return Reach(
        kld=float(_klds(study.samples[base]).mean()),
        spread=spread,
        per_gate=max(known) if len(known) == len(gates) else None,
        pooled=detectable(_pooled(study.samples[base]).kld_mean),
    )


def _klds(of_gates: Sequence[Samples]) -> NDArray[np.float64]:
    return np.concatenate([samples.kld_mean for samples in of_gates])


def _pooled(of_gates: Sequence[Samples]) -> Samples:
    return of_gates[0].model_copy(
        update={name: [x for samples in of_gates for x in getattr(samples, name)] for name in _GATED}
    )


def _quality_verdict(findings: Sequence[Finding]) -> Verdict:
    return overall([finding for finding in findings if finding.tier == "quality"])


def _judged(study: Study, arm: str, base: Samples, head: Samples, n_arms: int) -> tuple[Finding, ...]:
    others = [f"unchanged {number}" for number in range(1, n_arms)]
    before = [_quality_record(study, name, base) for name in (arm, *others)]
    after = [_quality_record(study, arm, head), *before[1:]]
    findings = judge(after, from_records(before, "undamaged"), profile="compared", today=study.measured.date())
    return tuple(finding for finding in findings if "unchanged" not in finding.subject)


def exact_changes(study: Study, damage: Damage) -> list[str]:
    """Metrics of the exact suite's life of a cache that a damage changes, by the gate's own comparison."""
    changed: dict[str, None] = {}
    for layer in STRUCK:
        if not strikes(damage, layer):
            continue
        base = record_of(study, "exact", damage.base, *_undamaged_life(damage.base, layer))
        head = record_of(study, "exact", damage.base, *exact.observe(exact_case(damage.base, layer, damage.change)))
        findings = judge([head], from_records([base], "undamaged"), profile="compared", today=study.measured.date())
        changed |= {finding.metric: None for finding in findings if not finding.passed}
    return list(changed)


@functools.cache
def _undamaged_life(base: str, layer: int) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    return exact.observe(exact_case(base, layer, undamaged))


def _quality_record(study: Study, name: str, samples: Samples) -> Record:
    return record_of(
        study,
        "perplexity",
        name,
        {"bits_per_value": Estimate(value=samples.bits_per_value, unit="bits")},
        {"kld_mean": samples.kld_mean, "delta_nll": samples.delta_nll},
    )


def record_of(
    study: Measured, suite: str, name: str, metrics: Mapping[str, Estimate], samples: Mapping[str, Sequence[float]]
) -> Record:
    """A record of a trial's samples, for the gate's own code to judge."""
    subject = Subject(
        suite=suite,
        protocol=str(study.protocol["name"]),
        model=study.model,
        method=MethodRef(name=name, target=4.0, target_means="code_bits", implementation=""),
        text=study.text,
        settings=dict(study.protocol),
        harness=provenance.harness_hash(),
        machine_class=machine.machine_class(suite_row(suite).moved_by),
    )
    measured = Provenance(
        started=study.measured,
        seconds=0.0,
        commit=None,
        dirty=False,
        versions=study.versions,
        hardware=study.hardware,
        state={},
    )
    return Record.create(
        subject=subject,
        status="measured",
        metrics=dict(metrics),
        samples={key: list(values) for key, values in samples.items()},
        engagement=[],
        provenance=measured,
    )
