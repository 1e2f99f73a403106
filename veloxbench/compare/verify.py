"""A published record measured again: does it hold here, and within what interval?

The record takes the baseline's place in the gate, and what is measured now that of the run: exact metrics must be
equal, per-sequence ones pass the paired test. A record of another machine has another draw of the quantization noise,
which the test counts; nothing else of the machine may decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from veloxbench.errors import UsageError
from veloxbench.gate.baselines import from_records, subject_name
from veloxbench.gate.gate import judge
from veloxbench.gate.verdicts import Finding, Verdict, overall
from veloxbench.inputs.corpora import NO_TEXT, TokenBlock, load_text, token_block
from veloxbench.inputs.models import ModelHandle, load_tokenizer, resolve_model
from veloxbench.measure.suite import Bench, Cell, cell_of, get_suite
from veloxbench.records.record import NO_MODEL, Record
from veloxbench.records.selection import shipped_records
from veloxbench.records.store import journals, read_records
from veloxbench.run.plan import measurement
from veloxbench.run.progress import Progress
from veloxbench.run.session import OnBench, measure

MEANS = {"nll": "nll", "delta_nll": "delta_nll", "kld_mean": "kld_mean", "top1": "top1_agreement"}
"""Samples whose mean is a metric, by the metric's name."""

SHORTEST_ID = 6
"""Characters of a record's id that are enough to name it."""


@dataclass(frozen=True)
class Verified:
    """A record, the same measured again here, and what the gate says of the two."""

    record: Record
    again: Record
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether every finding passes."""
        return overall(self.findings) is Verdict.PASS


def chosen_records(names: Sequence[str], folders: Sequence[Path]) -> list[Record]:
    """The records that are named by the beginning of an id, or by a file that has them.

    Args:
        names: ids or .jsonl files.
        folders: where ids are looked up; absent: the records that come with this program.

    Raises:
        UsageError: a name that is none of a record, or of several.
    """
    known: dict[str, Record] | None = None
    chosen: dict[str, Record] = {}
    for name in names:
        if name.endswith(".jsonl"):
            if not Path(name).is_file():
                raise UsageError(f"there is no file {name}")
            chosen |= {record.id: record for record in read_records(Path(name))}
            continue
        if known is None:
            known = {record.id: record for file in _files(folders) for record in read_records(file)}
        found = [record for record in known.values() if len(name) >= SHORTEST_ID and record.id.startswith(name)]
        if len(found) != 1:
            places = ", ".join(map(str, folders)) or "the records that come with veloxbench"
            raise UsageError(f"{len(found)} records in {places} have an id that begins with {name!r}; name one")
        chosen[found[0].id] = found[0]
    return list(chosen.values())


def _files(folders: Sequence[Path]) -> Iterable[Path]:
    return [file for folder in folders for file in journals(folder)] if folders else shipped_records()


def verified(records: Sequence[Record], progress: Progress, *, model: str | None = None) -> Iterator[Verified]:
    """Each record with what it is here, one model after the other.

    Args:
        records: of any suite whose numbers are not a clock's.
        progress: told what is measured.
        model: where the records' model is, if it is not known by their name.

    Raises:
        UsageError: timings, weights or tokens that are others here, or a method that is not here.
    """
    for record in records:
        if get_suite(record.subject.suite).row.moved_by == "speed":
            raise UsageError(
                f"{subject_name(record)} is a timing: those are one machine's at one moment; `veloxbench compare` "
                "times two revisions in one run"
            )
    handles: dict[str, ModelHandle] = {}
    with closing(OnBench(progress)) as on_bench:
        for record in sorted(records, key=lambda record: (record.subject.model.name, record.subject.suite)):
            of, handle, bench = record.subject.model, None, None
            if of != NO_MODEL:
                if of.name not in handles:
                    handles[of.name] = resolve_model(model or of.name)
                handle = handles[of.name]
                _check_model(record, handle)
                bench = on_bench.of(handle, of.n_layers)
            yield _verified(record, handle, bench, progress)


def _check_model(record: Record, handle: ModelHandle) -> None:
    for name in ("weights_sha256", "tokenizer_sha256", "config_sha256"):
        here, there = getattr(handle, name), getattr(record.subject.model, name)
        if here != there:
            raise UsageError(
                f"{subject_name(record)} was measured on another {name.partition('_')[0]} than {handle.directory} has "
                f"({there[:12]} and {here[:12]}): it cannot be verified with it"
            )


def _verified(record: Record, handle: ModelHandle | None, bench: Bench | None, progress: Progress) -> Verified:
    subject = record.subject
    cell = cell_of(get_suite(subject.suite), subject.settings, subject.method.alone)
    block = _block(record, cell, handle)
    item = measurement(cell, subject.model, block)
    progress.begin(f"{subject.model.name} {item.label}")
    again = measure(item, bench, lambda _: None)
    return Verified(record, again, (*inconsistent(record), *compared(record, again)))


def _block(record: Record, cell: Cell, handle: ModelHandle | None) -> TokenBlock:
    """The tokens that a record was measured on."""
    text = record.subject.text
    if handle is None or cell.sequences == 0:
        return NO_TEXT
    calibration = text.name.endswith(" (calibration)")
    block = token_block(
        load_text(text.name.removesuffix(" (calibration)"), "calibration" if calibration else "evaluation"),
        load_tokenizer(handle),
        n_sequences=cell.sequences,
        length=cell.length,
        vocabulary=handle.vocabulary,
    )
    if block.sha256 != text.tokens_sha256:
        raise UsageError(
            f"{subject_name(record)} was measured on other tokens of {text.name} than are here "
            f"({text.tokens_sha256[:12]} and {block.sha256[:12]}): it cannot be verified with them"
        )
    return block


def compared(record: Record, again: Record) -> list[Finding]:
    """What the gate says of a record as the baseline of another one.

    The record stands as if it were of this machine, but for its rounding: where that is another, the gate takes the
    noise as drawn anew.
    """
    there, here = record.provenance, again.provenance
    hardware = {**here.hardware, "rounding": there.hardware.get("rounding")}
    moved = record.model_copy(
        update={"provenance": there.model_copy(update={"hardware": hardware, "versions": here.versions})}
    )
    return judge([again], from_records([moved], f"record {record.id[:12]}"))


def inconsistent(record: Record) -> list[Finding]:
    """Metrics of a record that are not the means of its own samples."""
    findings = []
    for sample, metric in MEANS.items():
        if sample not in record.samples or metric not in record.metrics:
            continue
        value, mean = record.metrics[metric].value, float(np.mean(record.samples[sample]))
        if not abs(value - mean) <= 1e-9 * max(1.0, abs(mean)):  # both were computed in fp64 from the same numbers
            reason = f"the record says {value:.6g}, the mean of its own samples is {mean:.6g}"
            findings.append(Finding("exact", subject_name(record), metric, Verdict.REGRESS, reason, mean, value))
    return findings
