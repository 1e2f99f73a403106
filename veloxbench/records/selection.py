"""Which records count: of the last run, of the newest code, the newest of each row, and no controls.

A folder of results grows: it may hold records of other profiles, of earlier commits and of other machines. Pages,
gates and comparisons each judge a part of it, and every such part is chosen here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veloxbench.errors import IntegrityError
from veloxbench.records.arm import REFERENCE
from veloxbench.records.record import FailedMeasurement, Record, Subject
from veloxbench.records.store import (
    JOURNAL,
    LAST_RUN,
    MACHINE,
    find_records,
    journals,
    no_records,
    read_failures,
    read_newest,
    read_records,
    run_keys,
)

CONTROL = "shuffle"
"""The parameter that makes an arm a control: its allocation is dealt to other units at random, with this seed."""


def is_control(record: Record) -> bool:
    """Whether the record is of a shuffled allocation: a control of another arm, no method that anybody would use."""
    return CONTROL in record.subject.method.parameters


def without_controls(records: Iterable[Record]) -> list[Record]:
    """The records of methods that somebody would use."""
    return [record for record in records if not is_control(record)]


def read_folders(paths: Iterable[Path]) -> tuple[list[Record], int, list[FailedMeasurement]]:
    """Of several folders or journal files the newest record of each row of each file, how many others there are, and
    all failures; what stands in two of them counts once.

    Raises:
        UsageError: one of the paths does not exist.
        IntegrityError: a line that counts is not valid; the message names file and line.
    """
    records: dict[str, Record] = {}
    failures = {}
    others = 0
    for path in paths:
        if not path.exists():
            raise no_records(path)
        for file in journals(path):
            newest, more = read_newest(file)
            records.update({record.key: record for record in newest})
            others += more
        failures.update({(failure.subject.key, failure.when): failure for failure in read_failures(path)})
    return list(records.values()), others, list(failures.values())


def shipped_records() -> list[Path]:
    """The files of records that come with the package: measurements of the models that are known by name."""
    package = Path(__file__).parents[1]
    folder = package / "shipped_records"  # in a wheel; a checkout has them at its root
    return journals(folder if folder.is_dir() else package.parent / "records")


def read_last_run(path: Path) -> list[Record]:
    """The records of the last run into a folder (or of its journal); all of them where no run left its keys there.

    Raises:
        IntegrityError: the journal, or the list of keys, is damaged.
        UsageError: the last run ended before it knew its keys.
    """
    plan = (path if path.is_dir() else path.parent) / LAST_RUN
    if not (path.is_dir() or path.name == JOURNAL) or not plan.exists():
        return read_records(path)
    keys = run_keys(plan)
    records = [record for file in journals(path) for record in find_records(file, keys)]
    if len({record.key for record in records}) < len(records):
        raise IntegrityError(f"two journals of {path} measure one key: which of them is the later one, nobody can tell")
    return records


def of_newest_code(records: Iterable[Record]) -> list[Record]:
    """The records of the code that was measured last, oldest first.

    A folder of results may hold an earlier commit's records; one of those must not take the place of a benchmark
    that crashed in this one. Where a run left its keys, :func:`read_last_run` says more, for a return to earlier
    code measures nothing anew; this function serves records without them.
    """
    ordered = sorted(records, key=lambda record: record.provenance.started)
    newest = {_package(record): record.subject.method.implementation for record in ordered}
    harness = ordered[-1].subject.harness if ordered else ""
    return [
        record
        for record in ordered
        if record.subject.harness == harness and record.subject.method.implementation == newest[_package(record)]
    ]


def _package(record: Record) -> str:
    return record.subject.method.implementation.partition(" ")[0]


def row_key(subject: Subject) -> str:
    """What a measurement shares with the same one made by other code or on another machine: one row of a table."""
    method = {name: part for name, part in vars(subject.method).items() if name != "implementation"}
    fields = {name: part for name, part in vars(subject).items() if name not in ("harness", "machine_class")}
    return canonical(fields | {"method": method})


canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=vars).encode
"""JSON of parts of a record, the same for equal ones: what tells them apart where no hash is to be written down."""


Machine = tuple[Any, ...]


def machine_of(record: Record) -> Machine:
    """What tells the machine of a record from others (:data:`MACHINE`)."""
    return tuple(record.provenance.hardware.get(name) for name in MACHINE)


def by_machine(records: Iterable[Record]) -> dict[Machine, list[Record]]:
    """Records of each machine."""
    machines: dict[Machine, list[Record]] = {}
    for record in records:
        machines.setdefault(machine_of(record), []).append(record)
    return machines


def newest_per_row(records: Iterable[Record]) -> list[Record]:
    """The newest record of each row and machine: the reference first, then by method, parameters and falling target."""
    newest: dict[tuple[str, Machine], Record] = {}
    for record in records:
        row = row_key(record.subject), machine_of(record)
        if row not in newest or record.provenance.started > newest[row].provenance.started:
            newest[row] = record
    return sorted(newest.values(), key=_order)


def _order(record: Record) -> tuple[Any, ...]:
    method = record.subject.method
    parameters = repr(sorted(method.parameters.items()))
    return (method.name != REFERENCE.name, method.name, parameters, -(method.target or 0.0))


def table_rows(records: Iterable[Record]) -> list[Record]:
    """What the tables of a page show: the newest record of each row, without controls."""
    return without_controls(newest_per_row(records))
