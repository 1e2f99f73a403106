"""The crash-safe journal: one record per line, appended whole and synced, never rewritten."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from veloxbench.errors import IntegrityError, UsageError
from veloxbench.records.journal import append_line, cut_torn_tail, parsed_lines, read_content, sole_writer, write_text
from veloxbench.records.record import FailedMeasurement, Record

JOURNAL = "records.jsonl"
FAILURES = "failures.ndjson"
"""The file beside the records that has one line for each measurement that crashed. (``.jsonl`` files are records.)"""
LAST_RUN = "last-run.json"
"""Keys of the records that the last run into the folder was to make, measured by it or before."""


def read_records(path: Path) -> list[Record]:
    """Every record of a journal file, or of all ``*.jsonl`` files of a folder, in order.

    A last line without its newline was being written when the process died; it is not a record. A journal may measure
    a key anew (``veloxbench run --fresh``): its later record stands.

    Raises:
        IntegrityError: any other line that is not a valid record, the same record twice, or one key in two files;
            names file and line. A damaged journal is never read around.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    records: dict[str, Record] = {}
    for file in files:
        own: dict[str, Record] = {}
        for number, record in parsed_lines(file, read_content(file), Record.model_validate_json, "a valid record"):
            if record.key in records:
                raise IntegrityError(f"{file}:{number} measures key {record.key[:12]}, which another file has")
            if record.key in own and own[record.key].id == record.id:
                raise IntegrityError(f"{file}:{number} holds record {record.id[:12]} a second time")
            own[record.key] = record
        records |= own
    return list(records.values())


def read_failures(path: Path) -> list[FailedMeasurement]:
    """Every measurement that crashed in the runs into a folder (or a journal file's folder), in order.

    Those of which a later run made a record are among them.

    Raises:
        IntegrityError: a line is not valid; names file and line.
    """
    file = (path if path.is_dir() else path.parent) / FAILURES
    if not file.exists():
        return []
    parse = FailedMeasurement.model_validate_json
    return [failure for _, failure in parsed_lines(file, read_content(file), parse, "a valid failure")]


class Store:
    """The journal of one output folder, open for appending. Use :func:`open_store`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self._set_torn_tail_aside()
        self._records = {record.key: record for record in read_records(self.path)}

    def _set_torn_tail_aside(self) -> None:
        if not self.path.exists():
            return
        torn = cut_torn_tail(self.path)
        if torn:
            with self.path.with_suffix(".torn").open("ab") as aside:
                aside.write(torn + b"\n")

    def get(self, key: str) -> Record | None:
        """The record measured for this key, if any."""
        return self._records.get(key)

    def records(self) -> list[Record]:
        """All records, in the order in which they were measured."""
        return list(self._records.values())

    def begin(self, keys: Sequence[str] | None = None) -> None:
        """Note beside the records what a run is to make: these, and no others of the folder, are judged.

        Args:
            keys: of its records; None where the run does not know them yet: until it does, nothing is judged.
        """
        plan = {"keys": list(keys or ()), "planned": keys is not None}
        write_text(self.path.with_name(LAST_RUN), json.dumps(plan, indent=1) + "\n")

    def append(self, record: Record) -> None:
        """Add a record durably: one write, then fsync. A record of the same key before it is superseded.

        Raises:
            UsageError: the very same record is there already.
            UnfitEnvironmentError: the line could not be written.
        """
        kept = self._records.get(record.key)
        if kept is not None and kept.id == record.id:
            raise UsageError(f"record {record.id[:12]} ({record.subject.method.label}) is in {self.path} already")
        written = Record.from_line(record.to_line())  # as every later reader will see it
        append_line(self.path, written.to_line())
        self._records[record.key] = written

    def append_failure(self, failure: FailedMeasurement) -> None:
        """Add a measurement that crashed, durably: the page names it."""
        file = self.path.with_name(FAILURES)
        if file.exists():
            cut_torn_tail(file)
        append_line(file, failure.model_dump_json() + "\n")

    def failures(self) -> list[FailedMeasurement]:
        """Every measurement that crashed in this folder so far, see :func:`read_failures`."""
        return read_failures(self.path)


@contextmanager
def open_store(folder: Path) -> Iterator[Store]:
    """Open the journal of ``folder`` for one writer.

    Raises:
        UnfitEnvironmentError: the folder cannot be written, or another run is writing to it.
    """
    busy = f"another run is writing to {folder}; wait for it or choose another --out"
    with sole_writer(folder / ".lock", busy):
        yield Store(folder)
