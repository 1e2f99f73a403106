"""What records tell beyond the newest ones: earlier records of the same rows and what changed, and what was measured by
depth.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from veloxbench.errors import printable
from veloxbench.gate.changes import MOST_TESTS, Change, Changes
from veloxbench.gate.paired_test import ALPHA
from veloxbench.records.record import NO_MODEL, Record, content_hash
from veloxbench.records.selection import row_key
from veloxbench.records.store import journals, read_chosen
from veloxbench.report.cells import hardware_name, significant
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


def row_name(record: Record, several: bool) -> str:
    """A row by a name that tells it from a model's others.

    Args:
        several: whether the records are of several machines, so that the name says of which.
    """
    subject = record.subject
    place = f" on {hardware_name(record)}" if several else ""
    return (
        f"{subject.method.label}, {subject.protocol}, {subject.text.name} {content_hash(row_key(subject))[:4]}{place}"
    )


CHANGE_COLUMNS = ("row", "metric", "before → after", "change [95% interval]", "from", "to")


def change_cells(change: Change, several: bool) -> tuple[str, ...]:
    """A change as cells under :data:`CHANGE_COLUMNS`; ``several`` is that of :func:`row_name`."""
    figures = [f"{value:.6g}" if change.exact else significant(value) for value in change.values]
    if len(set(figures)) == 1:
        figures = [f"{value:.16g}" for value in change.values]
    grown = f"{change.values[1] - change.values[0]:+.3g}"
    interval = "" if change.exact else f" [{change.low:+.3g}, {change.high:+.3g}]"
    commits = (_commit(record) for record in (change.before, change.after))
    name = row_name(change.after, several)
    return tuple(map(printable, (name, change.metric, " → ".join(figures), grown + interval, *commits)))


def _commit(record: Record) -> str:
    made = record.provenance
    return f"{(made.commit or 'unknown')[:12]}{', changed' if made.dirty else ''} ({made.started:%Y-%m-%d})"


def bisection(change: Change) -> tuple[str, bool]:
    """The command that finds the commit, and whether it is one: otherwise why there is none."""
    subject = change.after.subject
    commits = [record.provenance.commit or "" for record in (change.before, change.after)]
    if not change.is_regression:
        better = change.values[1] < change.values[0] and not change.either_way
        return "better" if better else f"within the gate's limit, {significant(change.limit)}", False
    if subject.suite not in ("perplexity", "exact"):
        return f"bisect does not measure the suite {printable(subject.suite)}", False
    if commits[0] == commits[1] or not all(re.fullmatch("[0-9a-f]{7,64}", commit) for commit in commits):
        return "not between two known commits", False
    measured = "--suite exact" if subject.model == NO_MODEL else f"--model {shlex.quote(subject.model.name)}"
    ends = " ".join(commit[:12] for commit in commits)
    return printable(f"veloxbench bisect {ends} --subject {shlex.quote(subject.method.label)} {measured}"), True


def judged_changes(found: Changes) -> str:
    """How much was compared, how often noise alone is called a change, and what was left out."""
    text = (
        f"Pairs of neighbouring records whose code differs: {found.compared}; metrics changed: {len(found.changes)}. "
        "Bytes and codes changed if they are not equal, KLD if the gate's paired test over sequences says so, at "
        f"{ALPHA:.0%} over all {found.tests} tests together: of a hundred pages one at most has a mark for noise alone."
    )
    if found.tests > MOST_TESTS:
        text += f" More than {MOST_TESTS} at once are too many: no change of KLD can stand out. Compare fewer records."
    out = "; ".join(f"{count} × {reason}" for reason, count in found.left_out.items())
    return text + (f" Left out: {out}." if out else "")
