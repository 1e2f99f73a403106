"""What the HTML page has beyond the newest records: earlier ones of the same rows, and what was measured by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from veloxbench.records.record import Record
from veloxbench.records.store import journals, read_chosen
from veloxbench.report.guide import Sources

PER_ROW = 20
"""Records of one row that are drawn: the newest ones."""


def read_history(paths: Iterable[Path]) -> list[Record]:
    """The newest records of each row of journals or folders, as :func:`read_chosen` finds them.

    Raises:
        IntegrityError: a line that counts is not valid.
    """
    records: dict[str, Record] = {}
    for path in paths:
        for file in journals(path):
            taken: Counter[bytes] = Counter()

            def wanted(_: bytes, row: bytes, taken: Counter[bytes] = taken) -> bool:
                taken[row] += 1
                return taken[row] <= PER_ROW

            records |= {record.id: record for record in reversed(list(read_chosen(file, wanted)))}
    return list(records.values())


def read_depth(paths: Iterable[Path]) -> list[Mapping[str, Any]]:
    """What ``examples/sensitivity_by_depth.py`` measured, where a folder has it."""
    return [entry for path in paths if path.is_dir() for entry in Sources.read_depth(path)]
