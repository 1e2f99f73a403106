"""Base against head: two sets of records, or two revisions measured now, on this machine, by this harness.

Records are judged as by the stored-baseline gate, base standing in for the baselines: bytes and codes are equal,
quality lost no more than its limit. Revisions are also timed, in interleaved
blocks (:mod:`veloxbench.compare.timing_test`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from veloxbench.compare.revisions import Revision
from veloxbench.compare.side import WORK_TIMEOUT_S, Worker, WorkFailed, steady_environment
from veloxbench.compare.timed_decode import DecodeSpec, default_clock
from veloxbench.compare.timing_blocks import Slot, live_starts, open_decode
from veloxbench.compare.timing_test import TimingSpec, findings, run_gate
from veloxbench.errors import UsageError
from veloxbench.gate.baselines import from_records
from veloxbench.gate.gate import judge
from veloxbench.gate.verdicts import Finding, Tier, Verdict
from veloxbench.records.journal import line_number
from veloxbench.records.record import Record
from veloxbench.records.selection import read_last_run
from veloxbench.records.store import JOURNAL, LAST_RUN, find_records, journals
from veloxbench.records.suites import all_suites


def compare_records(base: Path, head: Path, message: Callable[[str], None]) -> list[Finding]:
    """Judge the records of head's last run by those of base's; a message says how many of other runs were left out.

    Raises:
        UsageError: a side has no records.
    """
    sides = {path: read_last_run(path) for path in (base, head)}
    for path, records in sides.items():
        if not records:
            raise UsageError(f"there are no records at {path}: nothing can be compared")
        every = sum(line_number(file, file.stat().st_size) - 1 for file in journals(path))
        if len(records) < every:
            message(
                f"warning: {every - len(records)} of the {every} records at {path} are of other runs than the last "
                f"({LAST_RUN}) and are not compared; run the wider profile there again: what is measured is kept"
            )
    return judge_records(sides[base], sides[head], str(base))


def judge_records(base: Sequence[Record], head: Sequence[Record], origin: str) -> list[Finding]:
    """The exact and the quality tier, with base's records as the baselines."""
    return judge(head, from_records(base, origin))


@dataclass(frozen=True)
class Plan:
    """What to compare two revisions by.

    Attributes:
        profile: grid of the records (a name or a TOML file); None compares timings only.
        timed: decode benchmarks by metric; none compares records only.
        threads: BLAS threads of each side; 0 leaves them as they are.
        seed: of the order in which the timed blocks are taken.
    """

    profile: str | None
    timed: dict[str, DecodeSpec]
    spec: TimingSpec
    threads: int
    seed: int


def compare_revisions(base: Revision, head: Revision, plan: Plan, message: Callable[[str], None]) -> list[Finding]:
    """Measure both revisions and judge head by base.

    What crashes is a finding, and the rest is judged: a regression of head, and nothing to compare with where base did.

    Raises:
        WorkerError: a side died.
        UsageError: a side imports another implementation than its own.
    """
    judged: list[Finding] = []
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(start(name, revision, plan.threads))
            for name, revision in (("base", base), ("head", head))
        }
        for name, revision in (("base", base), ("head", head)):
            try:
                hello = workers[name].ask("hello", packages=revision.packages)
            except WorkFailed as error:
                judged.append(_crash(name, f"revision {revision.name}", str(error), "gate"))
                continue
            for package, file in hello["files"].items():
                if not Path(file).resolve().is_relative_to(revision.folder.resolve()):
                    raise UsageError(f"{name} imports {package} from {file}, not from revision {revision.name}")
            message(f"{name}: {revision.name} ({revision.commit[:12]}), {hello['implementation']}")
        if judged:
            return judged
        if plan.profile is not None:
            records = {}
            for name, revision in (("base", base), ("head", head)):
                message(f"{name}: measuring the profile {plan.profile}")
                records[name], failures = _records(workers[name], revision, plan.profile)
                judged += [_crash(name, *failure) for failure in failures]
            if records["base"]:
                judged += judge_records(records["base"], records["head"], f"revision {base.name}")
        crashed, timed = _what_can_be_timed(workers, plan.timed)
        judged += crashed
    if timed:
        message(
            f"timing {', '.join(timed)} in interleaved blocks, both sides started anew after every "
            f"{plan.spec.blocks_per_start}, in the order of --seed {plan.seed}, which repeats it"
        )
        try:
            judged += _timings({"base": base, "head": head}, timed, plan)
        except WorkFailed as error:
            side = error.worker.partition(" ")[0]  # as `start` named it
            judged += [
                _crash(side, f"{decode.model} decode", str(error), "timing", metric) for metric, decode in timed.items()
            ]
    return judged


def start(side: str, revision: Revision, threads: int) -> Worker:
    """A side's process, in its revision's environment."""
    environment = revision.environment() | steady_environment(threads)
    return Worker(
        f"{side} ({revision.name})",
        log=revision.folder / "worker.log",
        environment=environment,
    )


def _records(worker: Worker, revision: Revision, profile: str) -> tuple[list[Record], list[tuple[str, str]]]:
    """What a side measured, and what crashed there with the reason."""
    folder = revision.folder / "records"
    try:
        outcome = worker.ask("run", timeout=WORK_TIMEOUT_S, profile=profile, out=str(folder))
    except WorkFailed as error:
        return [], [(f"profile {profile}", str(error))]
    failures = [
        (label, f"{worker.name}: {reason} (log: {folder / 'errors.log'})") for label, reason in outcome["failures"]
    ]
    return find_records(folder / JOURNAL, outcome["keys"]), failures


def _crash(side: str, subject: str, reason: str, tier: Tier | None = None, metric: str = "all") -> Finding:
    """A crash of head is a regression; where base crashed there is nothing to compare head with."""
    verdict = Verdict.NO_BASELINE if side == "base" else Verdict.REGRESS
    row = all_suites().get(subject.partition("/")[0])
    of_suite: Tier = "exact" if row is not None and row.exact is None else "quality"
    return Finding(tier or of_suite, subject, metric, verdict, f"it crashed: {reason}")


def _what_can_be_timed(
    workers: dict[str, Worker], asked: dict[str, DecodeSpec]
) -> tuple[list[Finding], dict[str, DecodeSpec]]:
    """Open every timed benchmark on both sides: a finding for each that crashes, and the benchmarks that both have."""
    crashed, timed = [], dict(asked)
    for side, worker in workers.items():
        for metric, decode in asked.items():
            try:
                open_decode(worker, metric, decode)
            except WorkFailed as error:
                crashed.append(_crash(side, f"{decode.model} decode", str(error), "timing", metric))
                timed.pop(metric, None)
    return crashed, timed


def _timings(revisions: dict[str, Revision], timed: dict[str, DecodeSpec], plan: Plan) -> list[Finding]:
    def launch(stack: ExitStack, order: Sequence[str]) -> dict[str, Worker]:
        workers = {}
        for side in order:
            workers[side] = stack.enter_context(start(side, revisions[side], plan.threads))
            for metric, decode in timed.items():
                open_decode(workers[side], metric, decode)
        return workers

    groups = [{f"{side} {metric}": Slot(side, metric) for side in ("base", "head")} for metric in timed]
    metrics = {metric: (f"base {metric}", f"head {metric}") for metric in timed}
    clock = default_clock()
    starts = live_starts(launch, groups, metrics, clock, plan.spec.blocks_per_start, plan.seed)
    result = run_gate(starts, plan.spec)
    subject = f"{', '.join(sorted({decode.model for decode in timed.values()}))} decode ({clock} time)"
    return findings(result, plan.spec, subject)
