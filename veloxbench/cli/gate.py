"""The gate's commands: ``veloxbench gate`` and ``veloxbench baseline``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from veloxbench.cli.options import AsJson
from veloxbench.cli.output import print_findings, print_table, to_stderr
from veloxbench.errors import BaselineError, ExitCode, VeloxError, unknown_name

if TYPE_CHECKING:
    from veloxbench.gate.approval import Proposal
    from veloxbench.gate.baselines import BaselineFile, Snapshot
    from veloxbench.gate.verdicts import Finding
    from veloxbench.records.record import Record

RecordsOption = Annotated[Path, typer.Option("--records", help="Folder or .jsonl file of the run's records.")]
BaselineOption = Annotated[Path, typer.Option("--baseline", help="Folder of the baselines.")]
ProfileOption = Annotated[
    str, typer.Option(help="The profile that was run: all of its baselines must have been produced.")
]

baseline_app = typer.Typer(
    name="baseline", no_args_is_help=True, rich_markup_mode="markdown", help="What gates compare with."
)


def read_run(path: Path, profile: str, *, any_checkout: bool = False) -> list[Record]:
    """The records of a profile's last run.

    Raises:
        UsageError: no such profile, no record of it (zero benchmarks is no pass), or records of other code.
    """
    from veloxbench.records.selection import read_last_run
    from veloxbench.run.grid import load_grid
    from veloxbench.run.plan import current_records

    return current_records(load_grid(profile), profile, read_last_run(path), path, any_checkout=any_checkout)


def gate(
    records: RecordsOption = Path("results"),
    baseline: BaselineOption = Path("baselines"),
    profile: ProfileOption = "gate",
    as_json: AsJson = False,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write the findings as JUnit XML here.")] = None,
    tier: Annotated[
        str | None, typer.Option(help="Judge **exact** or **quality** alone; exact holds on every machine.")
    ] = None,
    unknown: Annotated[
        str,
        typer.Option(
            "--unknown-machine",
            help="Where every quality baseline is of another machine: **fail** (exit 3), or judge by **exact** alone.",
        ),
    ] = "fail",
) -> None:
    """Judge a run by the baselines: exact facts are equal, quality lost no more than its limit.

    Fails closed: what a baseline holds must have been produced, and what was produced must have a baseline.

    Exit codes: 0 pass, 1 regression (or a benchmark that is gone), 2 inconclusive, 3 no baseline (missing, of another
    machine, model or text, edited by hand, expired), 4 usage (no records), 5 environment (a damaged record).

    **Example:** `veloxbench run --profile gate && veloxbench gate`
    """
    from veloxbench.gate.verdicts import exit_code, sentence, unjudged

    try:
        findings = _judged(records, baseline, profile, tier, unknown)
    except Exception as error:
        if isinstance(error, VeloxError):
            code, reason = error.exit_code, str(error)
        else:
            code, reason = ExitCode.ENVIRONMENT, f"{type(error).__name__}: {error}"
        _write([unjudged(reason)], code, as_json, junit_file)
        raise
    code = exit_code(findings)
    _write(findings, code, as_json, junit_file)
    if not as_json:
        print_findings(findings)
    log = (records if records.is_dir() else records.parent) / "errors.log"
    hint = f"; {log} says what crashed" if code and log.exists() else ""
    to_stderr(f"veloxbench gate: {sentence(findings)}{hint}")
    raise typer.Exit(int(code))


def _judged(records: Path, baseline: Path, profile: str, tier: str | None, unknown: str) -> list[Finding]:
    from veloxbench.gate.baselines import StoredTier, read_baselines
    from veloxbench.gate.gate import judge, unknown_machine

    stored = read_baselines(baseline)
    if tier is not None and tier not in get_args(StoredTier):
        raise unknown_name("tier", tier, get_args(StoredTier))
    if unknown not in ("fail", "exact"):
        raise unknown_name("--unknown-machine", unknown, ("fail", "exact"))
    run = read_run(records, profile)
    machine = unknown_machine(run, stored, profile) if unknown == "exact" and tier is None else None
    if machine is not None:
        tier = "exact"
        to_stderr(f"veloxbench gate: {baseline} has no quality baseline of this machine ({machine}):")
        to_stderr("veloxbench gate: held to the exact tier, quality was not judged")
    return judge(run, stored if tier is None else stored.of_tiers([tier]), profile=profile)


def _write(findings: Sequence[Finding], code: ExitCode, as_json: bool, junit_file: Path | None) -> None:
    """What machines read: JUnit, JSON, and on a GitHub runner annotations and the summary."""
    from veloxbench.gate.verdicts import overall
    from veloxbench.records.journal import write_text
    from veloxbench.report.github import publish
    from veloxbench.report.junit import junit

    if junit_file is not None:
        write_text(junit_file, junit(findings))
    if as_json:
        fields = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"verdict": overall(findings), "exit_code": int(code), "findings": fields}, indent=1))
    publish(findings, "VeloxBench gate", os.environ)


@baseline_app.command()
def show(baseline: BaselineOption = Path("baselines")) -> None:
    """What is stored: every file with its profile, machine, age, and who approved it why."""
    from veloxbench.gate.baselines import read_baselines

    rows = []
    for file in read_baselines(baseline).files:
        last = file.approvals[-1]
        row = (
            file.place,
            file.tier,
            f"{file.fingerprint['model']}, {file.fingerprint['protocol']}",
            ", ".join(str(value) for value in file.machine.values()) or "every machine",
            ", ".join(file.profiles),
            str(len(file.entries)),
            "never" if file.expires is None else str(file.expires),
            f"{last.when:%Y-%m-%d} {last.who}: {last.why}",
        )
        rows.append(row)
    print_table(("file", "tier", "what", "holds on", "profiles", "entries", "expires", "approved"), rows)


@baseline_app.command()
def verify(baseline: BaselineOption = Path("baselines")) -> None:
    """Are all files whole, as they were approved, in their places and in date?"""
    from veloxbench.gate.baselines import read_baselines

    files = read_baselines(baseline).files
    for file in files:
        for subject, day in file.expired(datetime.now(UTC).date()).items():
            raise BaselineError(
                f"{subject} of {file.place} in {baseline} expired on {day}; measure and approve it again"
            )
    print(f"{len(files)} files with {sum(len(file.entries) for file in files)} entries in {baseline} are as approved")


@baseline_app.command()
def diff(
    records: RecordsOption = Path("results"),
    baseline: BaselineOption = Path("baselines"),
    profile: ProfileOption = "gate",
) -> None:
    """What `approve` would change, and nothing is written. The verdict on it is `veloxbench gate`'s."""
    from veloxbench.gate.approval import propose
    from veloxbench.gate.baselines import Approval

    approval = Approval(who="", when=datetime.now(UTC), why="diff", commit=None)
    run = read_run(records, profile, any_checkout=True)
    _print_proposal(propose(run, baseline, approval, profile=profile, unknown_checkout=True))


@baseline_app.command()
def approve(
    reason: Annotated[str, typer.Option(help="Why the numbers may be these: kept in the file.")],
    records: RecordsOption = Path("results"),
    baseline: BaselineOption = Path("baselines"),
    profile: ProfileOption = "gate",
    release: Annotated[
        str | None, typer.Option(help="The version being released: drift is counted from these values on.")
    ] = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Forget entries of these files that the run does not have.")
    ] = False,
    unknown_checkout: Annotated[
        bool,
        typer.Option("--unknown-checkout", help="Take records that were measured outside every git checkout."),
    ] = False,
) -> None:
    """Make a run's records the baseline: the only way to change one.

    Refuses a changed checkout, and records that were measured in one or, unless told, outside any. Commit the files
    that it writes.

    **Example:** `veloxbench baseline approve --reason "rotation seed 1: KLD 3% lower, see the table in the change"`
    """
    from veloxbench.gate.approval import approve as write
    from veloxbench.gate.approval import propose, signed

    proposal = propose(
        read_run(records, profile, any_checkout=True),
        baseline,
        signed(baseline, reason, release=release),
        profile=profile,
        drop_missing=drop_missing,
        unknown_checkout=unknown_checkout,
    )
    _print_proposal(proposal)
    for path in write(proposal, baseline):
        print(f"wrote {path}")


def _print_proposal(proposal: Proposal) -> None:
    if not proposal.changes:
        print("the baselines hold these records already")
    for old, new in proposal.changes:
        print(f"{new.place} ({new.tier}, {new.fingerprint['model']}, {new.fingerprint['protocol']})")
        for line in _changes(old, new):
            print(f"  {line}")


def _changes(old: BaselineFile | None, new: BaselineFile) -> list[str]:
    before = {} if old is None else old.by_subject
    lines = [f"- {name}" for name in before if name not in new.by_subject]
    same = 0
    for name, entry in new.by_subject.items():
        if name not in before:
            lines.append(f"+ {name}: {_described(entry.approved)}")
            continue
        moved = _moved(before[name].approved, entry.approved)
        lines += [f"~ {name}: {change}" for change in moved]
        same += not moved
    return [*lines, *([f"= {same} unchanged"] if same else [])]


def _described(part: Snapshot) -> str:
    if part.status == "unsupported":
        return "unsupported"
    means = [f"{name} {sum(values) / len(values):.4g}" for name, values in part.samples.items() if len(values)]
    return ", ".join(means[:3]) if not part.metrics else f"{len(part.metrics)} metrics"


def _moved(old: Snapshot, new: Snapshot) -> list[str]:
    changes = [
        f"{name} {old.metrics.get(name)} -> {new.metrics.get(name)}"
        for name in sorted({*old.metrics, *new.metrics})
        if old.metrics.get(name) != new.metrics.get(name)
    ]
    for name in sorted({*old.samples, *new.samples}):
        one, other = old.samples.get(name), new.samples.get(name)
        if one != other:
            means = (f"{sum(values) / len(values):.6g}" if values else "absent" for values in (one, other))
            changes.append(f"{name} " + " -> ".join(means))
    return changes
