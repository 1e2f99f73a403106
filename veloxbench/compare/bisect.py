"""The first commit that made a cache worse, by git's own bisection with the paired gate as its test.

Git bisects in a worktree of its own that has no files (``--no-checkout``): neither the user's checkout nor a bisection
that goes on there is touched. The worktree is kept until the first bad commit is known, so that the same question goes
on where it was; what a revision measured is kept beside its tree in the cache anyway.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veloxbench.compare.revisions import resolve, run_git, said
from veloxbench.errors import UnfitEnvironmentError, UsageError, VeloxError, unknown_name
from veloxbench.gate.verdicts import Finding, Verdict, overall, sentence
from veloxbench.inputs.sources import cache_dir
from veloxbench.records.arm import Arm
from veloxbench.records.record import content_hash
from veloxbench.run.grid import Grid

Word = Literal["good", "bad", "skip"]


@dataclass(frozen=True)
class Judged:
    """What git is told of a commit, and why."""

    word: Word
    reason: str
    crashed: bool = False


def grid_text(grid: Grid) -> str:
    """A grid as TOML, with the sections of its own suites alone."""
    kept = Grid.model_fields.keys() | {suite.section for suite in grid.chosen_suites()}
    dumped = grid.model_dump(mode="json", include=set(kept))
    return "".join(f"{name} = {_toml(value)}\n" for name, value in dumped.items() if value is not None)


def _toml(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def judged(findings: Sequence[Finding], arm: str, crash_is_bad: bool = False) -> Judged:
    """What a comparison with the good revision says of a commit.

    Args:
        arm: the label whose findings count; those of other arms and of the reference do not.
        crash_is_bad: whether a crash is what is looked for; otherwise a commit that crashes is skipped.
    """
    crashed = [finding for finding in findings if finding.reason.startswith("it crashed")]
    if crashed:
        return Judged("bad" if crash_is_bad else "skip", sentence(crashed), crashed=True)
    own = [finding for finding in findings if arm in finding.subject.split()]
    word: dict[Verdict, Word] = {Verdict.PASS: "good", Verdict.REGRESS: "bad"}
    return Judged(word.get(overall(own), "skip"), sentence(own))


def bisect(
    good: str,
    bad: str,
    repository: Path,
    question: str,
    judge: Callable[[str], Judged],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Narrow the first bad commit down.

    Args:
        good: a revision that passes, from which the other one comes.
        bad: a revision that does not.
        question: what is asked of each commit; the same one goes on where it was.
        judge: compares a commit with the good one.
        say: is told each step.

    Returns:
        The first bad commit; several where commits that could not be judged stand beside it.

    Raises:
        UsageError: an unknown revision, or one that git cannot bisect from.
        UnfitEnvironmentError: git cannot make its worktree.
    """
    ends = [resolve(name, repository) for name in (good, bad)]
    top = run_git(repository, "rev-parse", "--absolute-git-dir").stdout.decode().strip()
    tree = cache_dir() / "bisect" / content_hash([top, *ends, question])[:16]
    _prepare(tree, ends[1], repository)
    if _git(tree, "bisect", "log") is None:
        done = run_git(tree, "bisect", "start", "--no-checkout", ends[1], ends[0])
        if done.returncode != 0:
            _remove(tree, repository)
            raise UsageError(f"git cannot bisect from {good} to {bad}: {said(done)}")
    else:
        say(f"going on with the bisection in {tree}")
    while not (culprits := _culprits(tree)):
        commit = _git(tree, "rev-parse", "BISECT_HEAD")
        if commit is None:
            raise UnfitEnvironmentError(f"git lost its place in {tree}: remove that folder and begin again")
        try:
            result = judge(commit)
        except VeloxError as error:  # it cannot be built, or has nothing to measure
            result = Judged("skip", str(error))
        title = _git(tree, "log", "-1", "--format=%s", commit) or ""
        say(f"{commit[:12]} {title}: {result.word} ({result.reason})")
        run_git(tree, "bisect", result.word, commit)
    _remove(tree, repository)
    return tuple(culprits)


def _git(tree: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails."""
    done = run_git(tree, *arguments)
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def _prepare(tree: Path, commit: str, repository: Path) -> None:
    """A worktree without files; one that was broken off is used again."""
    if _git(tree, "rev-parse", "--git-dir") is None or not (tree / ".git").exists():
        _remove(tree, repository)
        tree.parent.mkdir(parents=True, exist_ok=True)
        done = run_git(repository, "worktree", "add", "--detach", "--no-checkout", str(tree), commit)
        if done.returncode != 0:
            raise UnfitEnvironmentError(f"git cannot make a worktree at {tree}: {said(done)}")


def _remove(tree: Path, repository: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    run_git(repository, "worktree", "prune")


def _culprits(tree: Path) -> list[str]:
    """What git's log ends with, once it knows: the first bad commit, or those that it may be."""
    log = _git(tree, "bisect", "log") or ""
    return re.findall(r"^# (?:possible )?first bad commit: \[(\w+)\]", log, re.MULTILINE)


def check_ends(bad: Judged, name: str) -> None:
    """There is something to look for.

    Raises:
        UsageError: the bad revision is not worse than the good one.
    """
    if bad.word != "bad":
        raise UsageError(f"{name} is not worse than the good revision, so that no commit made it so: {bad.reason}")


def subject_label(grid: Grid, subject: str) -> str:
    """The label of the arm that is asked about.

    Raises:
        UsageError: the grid does not measure it; the arms that it measures are named.
    """
    suites = grid.chosen_suites()
    labels = {cell.arm.label for suite in suites for cell in suite.cells(grid.tasks(suite), grid.arm_list())}
    label = Arm.parse(subject).label
    if label not in labels:
        raise unknown_name("subject", label, labels)
    return label


def described(commit: str, repository: Path) -> str:
    """A commit with its day, author and title, on one line."""
    return _git(repository, "log", "-1", "--date=short", "--format=%H %ad %an: %s", commit) or commit
