"""Which of a folder's records count."""

import json
from datetime import timedelta

import pytest
from gate_records import HARDWARE, NOW, quality_record

from veloxbench.errors import UsageError
from veloxbench.records.record import FailedMeasurement, Record
from veloxbench.records.selection import (
    newest_per_row,
    of_newest_code,
    read_folders,
    read_last_run,
    table_rows,
)
from veloxbench.records.store import CONTRIBUTED, FAILURES, JOURNAL, LAST_RUN


def write(folder, records: list[Record]) -> list[Record]:
    folder.mkdir(exist_ok=True)
    (folder / JOURNAL).write_text("".join(record.to_line() for record in records))
    return records


def before(minutes: int, target: float = 4.0, code: str = "veloxquant_mlx 0") -> Record:
    return quality_record(target=target, started=NOW - timedelta(minutes=minutes), implementation=code)


def test_the_last_run_is_what_its_keys_say(tmp_path):
    """Of two records the one whose key the run left; of a folder without keys both, and of another file all of it."""
    old, new = write(tmp_path, [before(1), quality_record()])
    assert read_last_run(tmp_path) == [old, new]
    (tmp_path / LAST_RUN).write_text(json.dumps({"keys": [new.key]}))
    assert read_last_run(tmp_path) == read_last_run(tmp_path / JOURNAL) == [new]
    (tmp_path / "kept.jsonl").write_text(old.to_line())
    assert read_last_run(tmp_path / "kept.jsonl") == [old]


def test_newer_code_takes_the_place_of_older_code_in_every_row():
    """A row that only the older code measured is not of the newest code; another package keeps its own newest."""
    other = before(9, 8.0, "elsewhere 3")
    records = [before(3), before(2, 2.0), quality_record(), other]
    assert of_newest_code(records) == [other, quality_record()]


def test_the_newest_of_each_row_stands_whatever_the_code():
    """Two records of one row leave the later one; other rows stay; fp16 comes first, then falling targets."""
    lone, reference = before(5, 2.0), quality_record("fp16", None)
    assert newest_per_row([lone, before(3), quality_record(), reference]) == [reference, quality_record(), lone]


def of_apple(minutes: int) -> Record:
    """The same row, measured on a Mac."""
    there = quality_record(hardware={**HARDWARE, "chip": "Apple M4"}, started=NOW - timedelta(minutes=minutes))
    kept = {name: getattr(there, name) for name in ("status", "metrics", "samples", "engagement", "provenance")}
    return Record.create(subject=there.subject.model_copy(update={"machine_class": "of a Mac"}), **kept)


def test_another_machines_record_stands_beside_and_replaces_none(tmp_path):
    """A row measured here, on a Mac, and again here: the newer of this machine and the Mac's, read from a journal too.

    Another kernel of the operating system is no other machine.
    """
    apple = of_apple(5)
    updated = quality_record(hardware={**HARDWARE, "os": "Linux 7"})
    rows = [before(9), apple, updated]
    assert newest_per_row(rows) == [updated, apple]
    write(tmp_path, rows)
    records, others, _ = read_folders([tmp_path])
    assert (records, others) == ([updated, apple], 1)


def test_contributed_records_are_read_with_the_others(tmp_path):
    """A folder of published records has other people's in a folder of its own."""
    write(tmp_path, [quality_record()])
    apple = of_apple(5)
    write(tmp_path / CONTRIBUTED, [apple])
    assert read_folders([tmp_path])[0] == [quality_record(), apple]


def test_controls_are_no_rows():
    """A shuffled allocation is left out of tables, its unshuffled twin is not."""
    own = quality_record()
    method = own.subject.method.model_copy(update={"parameters": {"shuffle": 1}})
    subject = own.subject.model_copy(update={"method": method})
    kept = {name: getattr(own, name) for name in ("status", "metrics", "samples", "engagement", "provenance")}
    assert table_rows([Record.create(subject=subject, **kept), own]) == [own]


def test_what_stands_in_two_folders_counts_once(tmp_path):
    """Records and failures of both folders, those of the same key and moment once."""
    shared = quality_record()
    failure = FailedMeasurement(subject=shared.subject, when=NOW, reason="boom")
    for name, own in (("a", before(1)), ("b", before(2, 2.0))):
        write(tmp_path / name, [own, shared] if own.subject.method.target == 4.0 else [shared, own])
        (tmp_path / name / FAILURES).write_text(failure.model_dump_json() + "\n")
    records, others, failures = read_folders([tmp_path / "a", tmp_path / "b"])
    assert records == [shared, before(2, 2.0)]
    assert others == 1  # an older record of a row of a's
    assert failures == [failure]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    """The sentence says which, and how to make it."""
    with pytest.raises(UsageError, match=f"no records at {tmp_path / 'none'}"):
        read_folders([tmp_path / "none"])
