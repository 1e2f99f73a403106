"""The crash-safe journal: one record per line, appended whole and synced, never rewritten."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from veloxbench.errors import IntegrityError, UsageError, validation_reason
from veloxbench.records.journal import (
    append_line,
    blocks_backward,
    cut_torn_tail,
    line_number,
    parsed_lines,
    read_content,
    sole_writer,
    write_text,
)
from veloxbench.records.record import SUBJECT, FailedMeasurement, Record

JOURNAL = "records.jsonl"
FAILURES = "failures.ndjson"
"""The file beside the records that has one line for each measurement that crashed. (``.jsonl`` files are records.)"""
LAST_RUN = "last-run.json"
"""Keys of the records that the last run into the folder was to make, measured by it or before."""
CONTRIBUTED = "contributed"
"""The folder within one of published records that has those of other people's machines."""
MACHINE = ("chip", "physical_cores", "device", "blas")
"""What of the hardware makes another machine of it: its rows stand beside those of others, and replace none."""


def read_records(path: Path) -> list[Record]:
    """Every record of a journal file, or of all ``*.jsonl`` files of a folder, in order.

    A last line without its newline was being written when the process died; it is not a record. A journal may measure
    a key anew (``veloxbench run --fresh``): its later record stands.

    Raises:
        IntegrityError: any other line that is not a valid record, the same record twice, or one key in two files;
            names file and line. A damaged journal is never read around.
    """
    records: dict[str, Record] = {}
    for file in journals(path):
        own: dict[str, Record] = {}
        for number, record in parsed_lines(file, read_content(file), Record.from_line, "a valid record"):
            if record.key in records:
                raise IntegrityError(f"{file}:{number} measures key {record.key[:12]}, which another file has")
            if record.key in own and own[record.key].id == record.id:
                raise IntegrityError(f"{file}:{number} holds record {record.id[:12]} a second time")
            own[record.key] = record
        records |= own
    return list(records.values())


def journals(path: Path) -> list[Path]:
    """A journal file itself, or all of a folder, contributed ones last."""
    if path.is_dir():
        return [*sorted(path.glob("*.jsonl")), *sorted(path.glob(f"{CONTRIBUTED}/*.jsonl"))]
    return [path] if path.exists() else []


def no_records(path: Path) -> UsageError:
    """What is said of a folder or a file that a command was to read records from, and that has none."""
    return UsageError(f"there are no records at {path}; `veloxbench run --out {path}` makes them")


_KEY = b',"key":"'
_HARDWARE = b'"hardware":{'


@functools.lru_cache(256)
def _machine(hardware: bytes) -> bytes:
    """The machine of a line's hardware, unparsed but for those few that differ."""
    try:
        fields = json.loads(b"{" + hardware + b"}")
        return repr([fields.get(name) for name in MACHINE]).encode()
    except (ValueError, AttributeError):
        return hardware


def _glance(lines: bytes, begin: int, end: int) -> tuple[bytes, bytes] | None:
    """Key and row of a record's line among others, unparsed; None where it is not as :meth:`Record.to_line` writes it.

    The row is the machine and the end of the line: a subject's fields are sorted, and what differs between two states
    of the code (harness, machine class, implementation) stands before the method's name.
    """
    subject = lines.rfind(SUBJECT, begin, end)
    key = lines.find(_KEY, begin, end) + len(_KEY)
    row = lines.find(b',"name":', subject, end)
    if min(subject, row) < 0 or lines[key + 64 : key + 65] != b'"' or lines.find(SUBJECT, begin, subject) >= 0:
        return None
    hardware = lines.find(_HARDWARE, key, subject) + len(_HARDWARE)
    machine = _machine(lines[hardware : lines.find(b"}", hardware, subject)])
    return lines[key : key + 64], machine + lines[row:end]


def read_chosen(file: Path, chosen: Callable[[bytes, bytes], bool]) -> Iterator[Record]:
    """Records of a journal from its last line to its first; only the lines that are chosen are parsed.

    A journal of a million records is looked through in seconds, since few of its lines matter to a page or a gate.

    Args:
        file: the journal.
        chosen: told a line's key and its row (which are those of :func:`_glance`), says whether the record is wanted.

    Raises:
        IntegrityError: a line that is chosen, or that does not look like a record's, is not valid.
    """
    try:
        for offset, lines in blocks_backward(file):
            end = len(lines) - 1
            while end >= 0:
                begin = lines.rfind(b"\n", 0, end) + 1
                known, record = _glance(lines, begin, end), None
                try:
                    if known is None:
                        record = Record.from_line(lines[begin:end])
                        written = record.to_line().rstrip().encode()
                        known = _glance(written, 0, len(written)) or (record.key.encode(), lines[begin:end])
                    if chosen(*known):
                        yield record or Record.from_line(lines[begin:end])
                except ValidationError as error:
                    place, reason = f"{file}:{line_number(file, offset + begin)}", validation_reason(error)
                    raise IntegrityError(f"{place} is not a valid record: {reason}") from error
                end = begin - 1
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read: {error.strerror or error}") from error


def find_records(file: Path, keys: Iterable[str]) -> list[Record]:
    """The last record of each key in a journal, in its order; it is read backward only as far as it must be."""
    missing = {key.encode(errors="replace") for key in keys}
    records: list[Record] = []
    if missing and file.exists():
        for record in read_chosen(file, lambda key, _: key in missing):
            records.append(record)
            missing.remove(record.key.encode())
            if not missing:
                break
    return records[::-1]


def read_newest(file: Path) -> tuple[list[Record], int]:
    """The last record of each row of a journal, in the order of the rows' first ones, and how many others there are."""
    first: dict[bytes, int] = {}  # of each row the number, from the last line, of its first one
    lines = 0

    def is_new(_: bytes, row: bytes) -> bool:
        nonlocal lines
        new = row not in first
        first[row] = lines
        lines += 1
        return new

    records = zip(list(read_chosen(file, is_new)), first.values(), strict=True)
    return [record for record, _ in sorted(records, key=lambda pair: -pair[1])], lines - len(first)


def run_keys(plan: Path) -> list[str]:
    """The keys that a run noted in its :data:`LAST_RUN`.

    Raises:
        IntegrityError: the note is damaged.
        UsageError: the run ended before it knew its keys.
    """
    try:
        noted = json.loads(read_content(plan))
        keys = list(map(str, noted["keys"]))
        planned = bool(noted.get("planned", True))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{plan} does not hold the keys of the last run: {error}; run it again") from error
    if not planned:
        raise UsageError(
            f"the last run into {plan.parent} ended before it knew what to measure: nothing there is its result; "
            "run it again"
        )
    return keys


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
        self._known: dict[str, Record | None] = {}

    def _set_torn_tail_aside(self) -> None:
        if not self.path.exists():
            return
        torn = cut_torn_tail(self.path)
        if torn:
            with self.path.with_suffix(".torn").open("ab") as aside:
                aside.write(torn + b"\n")

    def look_up(self, keys: Iterable[str]) -> None:
        """Read the records of these keys, as far as there are any; of many keys in one pass."""
        asked = [key for key in keys if key not in self._known]
        self._known |= dict.fromkeys(asked) | {record.key: record for record in find_records(self.path, asked)}

    def get(self, key: str) -> Record | None:
        """The record measured for this key, if any."""
        self.look_up([key])
        return self._known[key]

    def newest(self) -> tuple[list[Record], int]:
        """The newest record of each row, and how many others there are: see :func:`read_newest`."""
        return read_newest(self.path) if self.path.exists() else ([], 0)

    def begin(self, keys: Sequence[str] | None = None) -> None:
        """Note beside the records what a run is to make: these, and no others of the folder, are judged.

        Args:
            keys: of its records; None where the run does not know them yet: until it does, nothing is judged.
        """
        self.look_up(keys or ())
        plan = {"keys": list(keys or ()), "planned": keys is not None}
        write_text(self.path.with_name(LAST_RUN), json.dumps(plan, indent=1) + "\n")

    def append(self, record: Record) -> None:
        """Add a record durably: one write, then fsync. A record of the same key before it is superseded.

        Raises:
            UsageError: the very same record is there already.
            UnfitEnvironmentError: the line could not be written.
        """
        kept = self.get(record.key)
        if kept is not None and kept.id == record.id:
            raise UsageError(f"record {record.id[:12]} ({record.subject.method.label}) is in {self.path} already")
        written = Record.from_line(record.to_line().encode())  # as every later reader will see it
        append_line(self.path, written.to_line())
        self._known[record.key] = written

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
