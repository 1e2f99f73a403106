"""The only writer of baselines: who approves a run's records, from which checkout, and what would change."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from veloxbench.errors import UnfitEnvironmentError, UsageError
from veloxbench.gate.baselines import (
    Approval,
    BaselineFile,
    Baselines,
    grouped,
    merged,
    read_baselines,
    subject_name,
)
from veloxbench.gate.paired_test import MIN_SEQUENCES
from veloxbench.records.journal import write_text
from veloxbench.records.provenance import git
from veloxbench.records.record import Record


def checkout_changes(folder: Path) -> list[str] | None:
    """Tracked files that differ from the commit of the checkout around ``folder``, baselines left out; None outside.

    Raises:
        UnfitEnvironmentError: git does not answer in a checkout: that is not taken for a clean one.
    """
    place = folder.resolve()
    while not place.is_dir():
        place = place.parent
    top = git(place, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    inside = folder.resolve().relative_to(Path(top).resolve()).as_posix()
    status = git(Path(top), "status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){inside}")
    if status is None:
        raise UnfitEnvironmentError(f"git cannot tell whether the checkout {top} has changed files")
    return status.splitlines()


def signed(folder: Path, why: str, *, who: str | None = None, release: str | None = None) -> Approval:
    """An approval in the name of the checkout's git user, at its commit.

    Raises:
        UsageError: no reason is given, or the checkout has changed files.
    """
    if not why.strip():
        raise UsageError("an approval needs its --reason: the next reader will ask why the numbers moved")
    changed = checkout_changes(folder)
    if changed:
        raise UsageError(
            f"the checkout has {len(changed)} changed files (first: {changed[0].strip()}); commit, measure, approve"
        )
    place = folder.resolve().parent
    user = who or " ".join(filter(None, [git(place, "config", "user.name"), git(place, "config", "user.email")]))
    return Approval(
        who=user or getpass.getuser(),
        when=datetime.now(UTC),
        why=why.strip(),
        commit=git(place, "rev-parse", "HEAD"),
        release=release,
    )


@dataclass(frozen=True)
class Proposal:
    """What an approval would write: for each file, how it was and how it would be."""

    changes: tuple[tuple[BaselineFile | None, BaselineFile], ...]


def propose(
    records: Sequence[Record],
    folder: Path,
    approval: Approval,
    *,
    profile: str,
    drop_missing: bool = False,
    unknown_checkout: bool = False,
) -> Proposal:
    """The files that an approval of these records would write.

    Args:
        records: of one run.
        folder: where baselines lie; may not exist yet.
        approval: who, why, and the release from which drift is counted anew, if it is one.
        profile: runs of this profile must produce the entries from now on.
        drop_missing: forget entries that the records do not have.
        unknown_checkout: take records of which nobody can tell whether they were measured on committed code.

    Raises:
        UsageError: no gated metric in the records, records from a changed checkout, or from none, or fewer sequences
            than a gate can judge.
        BaselineError: a file in the folder is not valid.
    """
    dirty = [record for record in records if record.provenance.dirty or record.provenance.project_dirty]
    if dirty:
        raise UsageError(
            f"{len(dirty)} records were measured in a changed checkout (first: {subject_name(dirty[0])}): commit, then "
            f"`veloxbench run --profile {profile} --fresh` measures again, then approve"
        )
    unknown = [r for r in records if r.provenance.dirty is None and r.provenance.project_dirty is None]
    if unknown and not unknown_checkout:
        raise UsageError(
            f"nobody can tell whether {len(unknown)} records were measured on committed code (first: "
            f"{subject_name(unknown[0])}): no git checkout was around the measuring code or the working directory; "
            "measure in the project's checkout, or approve with --unknown-checkout and say in --reason what it was"
        )
    groups = grouped(records)
    if not groups:
        raise UsageError("the records hold no metric that a gate judges: perplexity, memory and exact suites do")
    few = [
        f"{name} has {len(values)}"
        for group in groups
        for name, part in group.snapshots.items()
        for values in list(part.samples.values())[:1]
        if group.tier == "quality" and len(values) < MIN_SEQUENCES
    ]
    if few:
        raise UsageError(
            f"a gate needs {MIN_SEQUENCES} sequences, and {few[0]} ({len(few)} arms have too few): give the profile "
            f"{profile!r} at least {MIN_SEQUENCES}, run it and approve that"
        )
    existing = read_baselines(folder) if any(folder.glob("*/*.json")) else Baselines((), str(folder))
    changes = []
    for group in groups:
        old = existing.own(group)
        new = merged(old, group, approval, profile=profile, release=approval.release, drop_missing=drop_missing)
        if old is None or (old.entries, old.profiles) != (new.entries, new.profiles):
            changes.append((old, new))
    return Proposal(tuple(changes))


def approve(proposal: Proposal, folder: Path) -> list[Path]:
    """Write the proposed files, each whole or not at all: the only writer of baselines."""
    written = []
    for _, new in proposal.changes:
        path = folder / new.place
        write_text(path, new.to_text())
        written.append(path)
    return written
