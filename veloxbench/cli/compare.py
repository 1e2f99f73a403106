"""``veloxbench compare``: two revisions, or the records of two runs."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veloxbench.cli.output import above_zero, listed, print_findings, to_stderr
from veloxbench.errors import ExitCode, UsageError, unknown_name

if TYPE_CHECKING:
    from veloxbench.compare.timed_decode import DecodeSpec


def compare(
    base: Annotated[str, typer.Argument(help="A git revision, or a folder or .jsonl file of records.")],
    head: Annotated[str, typer.Argument(help="What is judged: the same kind of thing.")],
    repository: Annotated[Path, typer.Option("--repo", help="The repository of the revisions.")] = Path(),
    profile: Annotated[str, typer.Option(help="What both revisions measure for the exact and quality tiers.")] = "gate",
    timed: Annotated[
        str,
        typer.Option(help="Caches whose decode is timed, as `turboquant_mse@4,mlx-affine@4`; `none` times nothing."),
    ] = "turboquant_mse@4",
    model: Annotated[str, typer.Option(help="The model of the timings.")] = "smollm2-135m",
    tiers: Annotated[str, typer.Option(help="**all**, **records** (exact and quality) or **timing**.")] = "all",
    minutes: Annotated[float, typer.Option(callback=above_zero, help="Budget of the timings.")] = 30.0,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            help="BLAS threads of each side where timings are taken; 0 leaves them as they are. The published error "
            "rates are those of one thread on one core (`--core`).",
        ),
    ] = 1,
    core: Annotated[int | None, typer.Option(min=0, help="Keep both sides on this core (Linux).")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Order of the timed blocks; drawn anew, and printed, unless given.")
    ] = None,
) -> None:
    """Judge HEAD by BASE: exact facts, quality and timing of two revisions, or the records of two runs.

    Each revision is exported once and kept in the user's cache; where its dependencies are not those of this
    environment, it gets its own. Both are measured by this veloxbench, and timed in turns on this machine. What is not
    committed is not compared. Of a folder of records its last run is compared; how many others were left out is said.

    Exit codes: 0 pass, 1 regression (or a crash of HEAD, or a side that died), 2 inconclusive, 3 nothing to compare
    with (BASE crashed there), 4 usage, 5 environment (a build that failed).

    **Examples**

    `veloxbench compare v0.1.0 HEAD`

    `veloxbench compare main HEAD --tiers timing --timed turboquant_mse@4,turboquant_mse@2`

    `veloxbench compare results-before results-after`
    """
    from veloxbench.compare.compare import Plan, compare_records, compare_revisions
    from veloxbench.gate.verdicts import exit_code, sentence
    from veloxbench.report.github import publish

    if tiers not in ("all", "records", "timing"):
        raise unknown_name("tiers", tiers, ("all", "records", "timing"))
    are_records = [Path(side).exists() for side in (base, head)]
    if all(are_records):
        findings = compare_records(Path(base), Path(head), to_stderr)
    elif any(are_records):
        records, other = (base, head) if are_records[0] else (head, base)
        raise UsageError(f"{records} is a set of records and {other} is not: compare two of a kind")
    else:
        from veloxbench.compare.revisions import prepare, resolve
        from veloxbench.compare.timing_blocks import pin_to_core
        from veloxbench.compare.timing_test import TimingSpec
        from veloxbench.records.provenance import git

        decodes = {} if tiers == "records" or timed == "none" else _timed(timed, model)
        plan = Plan(
            profile=None if tiers == "timing" else profile,
            timed=decodes,
            spec=TimingSpec(max_seconds=60 * minutes),
            threads=threads if decodes else 0,
            seed=secrets.randbits(32) if seed is None else seed,
        )
        if core is not None:
            pin_to_core(core)
        for name in (base, head):  # a typing error costs no build
            resolve(name, repository)
        changed = (git(repository, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
        if changed:
            to_stderr(f"warning: {len(changed)} changed files are not compared: a revision is what is committed")
        sides = [prepare(name, repository) for name in (base, head)]
        findings = compare_revisions(sides[0], sides[1], plan, to_stderr)
    print_findings(findings)
    publish(findings, "VeloxBench compare", os.environ)
    to_stderr(f"veloxbench compare: {sentence(findings)}")
    raise typer.Exit(int(exit_code(findings)))


def bisect(
    good: Annotated[str, typer.Argument(help="A git revision that is good.")],
    bad: Annotated[str, typer.Argument(help="A later one that is not.")],
    subject: Annotated[str, typer.Option(help="The cache that became worse, as `turboquant_mse@4:sinks=4`.")],
    repository: Annotated[Path, typer.Option("--repo", help="The repository of the revisions.")] = Path(),
    suite: Annotated[str, typer.Option(help="**perplexity** (quality and bytes) or **exact** (fixed inputs).")] = (
        "perplexity"
    ),
    profile: Annotated[str, typer.Option(help="Whose protocols and texts are measured.")] = "gate",
    model: Annotated[str | None, typer.Option(help="In place of the profile's models.")] = None,
) -> None:
    """Find the first commit that made a cache worse: `git bisect`, with the paired gate of `compare` as its test.

    Each commit is measured beside GOOD. One that passes is good, one that regresses is bad; one that cannot be built,
    crashes or leaves the test undecided is skipped (a crash is bad where BAD itself crashes). Git bisects in a
    worktree of its own in the user's cache: your checkout stays as it is. Stop it at any time and type the same
    command again: it goes on where it was.

    Exit codes: 0 found, 2 only skipped commits are left (they are listed), 4 usage (BAD is not worse than GOOD).

    **Examples**

    `veloxbench bisect v0.1.0 HEAD --subject turboquant_mse@4`

    `veloxbench bisect HEAD~20 HEAD --subject turboquant_mse@4 --suite exact`
    """
    from veloxbench.compare import bisect as steps
    from veloxbench.compare.compare import Plan, compare_revisions
    from veloxbench.compare.revisions import prepare, resolve
    from veloxbench.compare.timing_test import TimingSpec
    from veloxbench.inputs.sources import cache_dir
    from veloxbench.records.journal import write_text
    from veloxbench.records.record import content_hash
    from veloxbench.run.grid import customise, load_grid

    if suite not in ("perplexity", "exact"):
        raise unknown_name("suite", suite, ("perplexity", "exact"))
    arms = None if suite == "exact" else [subject]
    grid = customise(load_grid(profile), suites=[suite], methods=arms or (), models=listed(model, "--model"))
    label = steps.subject_label(grid, subject)
    text = steps.grid_text(grid)
    file = cache_dir() / "bisect" / f"{content_hash(text)[:16]}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    plan = Plan(profile=str(file), timed={}, spec=TimingSpec(), threads=0, seed=0)
    base = prepare(good, repository)

    def judge(commit: str, crash_is_bad: bool = False) -> steps.Judged:
        findings = compare_revisions(base, prepare(commit, repository), plan, to_stderr)
        return steps.judged(findings, label, crash_is_bad)

    worst = judge(resolve(bad, repository), crash_is_bad=True)
    to_stderr(f"{bad}: {worst.word} ({worst.reason})")
    steps.check_ends(worst, bad)
    culprits = steps.bisect(good, bad, repository, text, lambda commit: judge(commit, worst.crashed), to_stderr)
    for commit in culprits:
        print(steps.described(commit, repository))
    if len(culprits) > 1:
        to_stderr(f"veloxbench bisect: one of these {len(culprits)} is the first bad commit; the others were skipped")
        raise typer.Exit(int(ExitCode.INCONCLUSIVE))
    to_stderr("veloxbench bisect: that is the first bad commit")


def _timed(text: str, model: str) -> dict[str, DecodeSpec]:
    from veloxbench.compare.timed_decode import DecodeSpec
    from veloxbench.methods.registry import checked
    from veloxbench.records.arm import Arm

    arms = [checked(Arm.parse(part)) for part in listed(text, "--timed")]
    return {f"decode of {arm}": DecodeSpec(model=model, arm=arm) for arm in arms}
