"""The crash-safe journal: one record per line, appended whole and synced, never rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from veloxbench.durable import append_line, cut_torn_tail, whole_lines
from veloxbench.errors import IntegrityError, UnfitEnvironmentError, UsageError
from veloxbench.records import Record

JOURNAL = "records.jsonl"


def read_records(path: Path) -> list[Record]:
    """Every record of a journal file, or of all ``*.jsonl`` files of a folder, in order.

    A last line without its newline was being written when the process died; it is not a record.

    Raises:
        IntegrityError: any other line that is not a valid record, or two records with one key; names
            file and line. A damaged journal is never read around.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    records: dict[str, Record] = {}
    for file in files:
        for number, line in enumerate(whole_lines(file.read_bytes()), start=1):
            try:
                record = Record.from_line(line.decode())
            except (ValidationError, UnicodeDecodeError) as error:
                reason = validation_reason(error) if isinstance(error, ValidationError) else str(error)
                raise IntegrityError(f"{file}:{number} is not a valid record: {reason}") from error
            if record.key in records:
                raise IntegrityError(f"{file}:{number} measures key {record.key[:12]} a second time")
            records[record.key] = record
    return list(records.values())


def validation_reason(error: ValidationError) -> str:
    """The first thing wrong, with the field where it is."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


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

    def append(self, record: Record) -> None:
        """Add a record durably: one write, then fsync.

        Raises:
            UsageError: the key is already recorded.
            UnfitEnvironmentError: the line could not be written.
        """
        if record.key in self._records:
            raise UsageError(
                f"key {record.key[:12]} ({record.subject.method.label}) is already recorded in {self.path}"
            )
        written = Record.from_line(record.to_line())  # as every later reader will see it
        append_line(self.path, written.to_line())
        self._records[record.key] = written


@contextmanager
def open_store(folder: Path) -> Iterator[Store]:
    """Open the journal of ``folder`` for one writer.

    Raises:
        UnfitEnvironmentError: the folder cannot be written, or another run is writing to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UnfitEnvironmentError(
            f"another run is writing to {folder}; wait for it or choose another --out"
        ) from error
    except OSError as error:
        raise UnfitEnvironmentError(f"cannot write to the output folder {folder}: {error.strerror or error}") from error
    try:
        yield Store(folder)
    finally:
        lock.release()
