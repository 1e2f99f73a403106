"""Several folders of records made into one: shards of a run on several machines become the run.

A cell that two folders measured must have the same figures in both, or nothing is merged: which of them is right,
nobody can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veloxbench.errors import UsageError
from veloxbench.records.record import FailedMeasurement, Record, content_hash
from veloxbench.records.store import LAST_RUN, Store, journals, no_records, read_failures, read_records, run_keys


@dataclass(frozen=True)
class Merged:
    """What several folders hold together.

    Attributes:
        records: each key once, in the order in which they were measured.
        failures: what crashed, each line once, in order.
        keys: of what the folders' last runs were to make; None where no folder notes any.
    """

    records: tuple[Record, ...]
    failures: tuple[FailedMeasurement, ...]
    keys: tuple[str, ...] | None


def figures(record: Record) -> dict[str, Any]:
    """What a record says was measured, without where and when."""
    return record.model_dump(mode="json", include={"key", "status", "reason", "metrics", "samples", "engagement"})


def merged(paths: Sequence[Path]) -> Merged:
    """The records of several folders or journal files.

    Raises:
        UsageError: a path that has no records, one whose last run ended before it knew its keys, or one cell with
            different figures in two of them; names the cell and both places.
        IntegrityError: a line that is not a valid record.
    """
    kept: dict[str, tuple[Record, Path]] = {}
    failures: dict[str, FailedMeasurement] = {}
    keys: dict[str, None] = {}
    noted = False
    for path in paths:
        if not journals(path):
            raise no_records(path)
        for record in read_records(path):
            before, place = kept.setdefault(record.key, (record, path))
            if content_hash(figures(before)) != content_hash(figures(record)):
                subject = record.subject
                raise UsageError(
                    f"{place} and {path} measured {subject.model.name} {subject.suite}/{subject.protocol} "
                    f"{subject.method.label} (key {record.key[:12]}) and have different figures "
                    f"({_differing(before, record)}): nothing was merged. Keep one of the two, or measure it again"
                )
            if record.provenance.started < before.provenance.started:
                kept[record.key] = record, path
        for failure in read_failures(path):
            failures.setdefault(content_hash(failure.model_dump(mode="json")), failure)
        if path.is_dir() and (path / LAST_RUN).exists():
            noted = True
            keys |= dict.fromkeys(run_keys(path / LAST_RUN))
    records = sorted((record for record, _ in kept.values()), key=lambda r: (r.provenance.started, r.key))
    ordered = sorted(failures.values(), key=lambda failure: failure.when)
    return Merged(tuple(records), tuple(ordered), tuple(keys) if noted else None)


def write(what: Merged, store: Store) -> int:
    """Add merged records to a store, the keys of the run they make with them; how many were not there before."""
    new = [record for record in what.records if store.get(record.key) is None]
    known = {content_hash(failure.model_dump(mode="json")) for failure in store.failures()}
    store.begin(what.keys if what.keys is not None else [record.key for record in what.records])
    for record in new:
        store.append(record)
    for failure in what.failures:
        if content_hash(failure.model_dump(mode="json")) not in known:
            store.append_failure(failure)
    return len(new)


def _differing(one: Record, other: Record) -> str:
    """The first thing in which two records of one cell differ."""
    names = sorted({*one.metrics, *other.metrics})
    moved = next((name for name in names if one.metrics.get(name) != other.metrics.get(name)), None)
    if moved is None:
        before, after = figures(one), figures(other)
        return next(part for part in before if before[part] != after[part])
    values = [str(record.metrics[moved].value) if moved in record.metrics else "absent" for record in (one, other)]
    return f"{moved} {' and '.join(values)}"
