"""The commands that measure the timing gate itself, and the command that compares two revisions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from veloxbench.compare.timed_decode import DecodeSpec
    from veloxbench.trials.timing_record import Setup

aa = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@aa.callback()
def _about() -> None:
    """The timing gate measured by experiment: how often it cries wolf, and how small a slowdown it sees."""


Core = Annotated[
    int | None, typer.Option(help="Keep both sides on this core (Linux), beside other work on the others.")
]
Threads = Annotated[int, typer.Option(help="BLAS threads of each side; kept in the file.")]
Model = Annotated[str, typer.Option(help="A name from `veloxbench models`, or a directory.")]
Depth = Annotated[int, typer.Option(help="Tokens in the cache before the timed steps.")]
Steps = Annotated[int, typer.Option(help="Timed decode steps of a sample.")]
ArmText = Annotated[str, typer.Option(help="The cache whose decode is timed, as `turboquant_mse@4`.")]


@aa.command()
def record(
    out: Annotated[Path, typer.Option(help="The series' journal (JSON lines); recording goes on where it ended.")],
    hours: Annotated[float, typer.Option(help="Recorded time that the file shall hold in the end.")] = 2.0,
    core: Core = None,
    threads: Threads = 1,
    model: Model = "smollm2-135m",
    depth: Depth = 128,
    steps: Steps = 3,
    arm: ArmText = "turboquant_mse@4",
) -> None:
    """Record a live A/A series of decode samples, with slowdowns of 2, 3, 5 and 10% made by real extra work.

    Two processes of the same code take turns; each block times both, and the second also with extra work, in a
    random mirrored order with a canary before and after. After eight blocks of each slowdown both are started anew.
    Stop it at any time and type the same command again.

    **Example:** `veloxbench aa record --hours 2 --out aa.jsonl --core 1`
    """
    from veloxbench.trials.timing_record import RecordSpec, to_stderr
    from veloxbench.trials.timing_record import record as record_series

    setup = _setup(core, threads, model, depth, steps, arm)
    record_series(RecordSpec(setup, hours), out, to_stderr)


RATES = "error-rates.json"


@aa.command()
def live(
    out: Annotated[Path, typer.Option(help="Journal of the gates; running goes on where it ended.")],
    gates: Annotated[int, typer.Option(help="Gates of each slowdown that the journal shall hold in the end.")] = 20,
    slowdown: Annotated[str, typer.Option(help="Percent of extra work in head, separated by commas; 0 is A/A.")] = (
        "0,5"
    ),
    core: Core = None,
    threads: Threads = 1,
    model: Model = "smollm2-135m",
    depth: Depth = 128,
    steps: Steps = 3,
    arm: ArmText = "turboquant_mse@4",
) -> None:
    """Run whole gates live: the same code on both sides, and head slowed down by real extra work, calibrated first.

    Stop it at any time and type the same command again. Several journals can grow at once, each on a core of its own.

    **Example:** `veloxbench aa live --gates 20 --slowdown 0,5 --out live.jsonl --core 1`
    """
    from veloxbench.compare.timed_decode import default_clock
    from veloxbench.compare.timing_test import TimingSpec
    from veloxbench.trials.timing_live import run_live
    from veloxbench.trials.timing_record import to_stderr

    setup = _setup(core, threads, model, depth, steps, arm)
    run_live(setup, out, _shares(slowdown), gates, TimingSpec(), default_clock(), to_stderr)


@aa.command()
def resample(
    series: Annotated[Path, typer.Argument(help="A recorded series (.jsonl, or .jsonl.xz).")],
    out: Annotated[Path, typer.Option(help="The record of error rates to write.")] = Path(RATES),
    gates: Annotated[int, typer.Option(help="Gates to draw for each slowdown.")] = 1000,
    live_gates: Annotated[
        list[Path] | None, typer.Option("--live", help="Journal of live gates to count as well; may be repeated.")
    ] = None,
    clock: Annotated[Literal["wall", "cpu"] | None, typer.Option(help="Default: as the gate on this device.")] = None,
    canary_drift: Annotated[float | None, typer.Option(help="Drift of the canary that voids a block.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the gates.")] = 0,
) -> None:
    """Draw gates from a recorded series and count how they end, for every slowdown in it.

    **Example:** `veloxbench aa resample aa.jsonl --gates 1000 --out error-rates.json`
    """
    from veloxbench.compare.timed_decode import default_clock
    from veloxbench.compare.timing_test import TimingSpec
    from veloxbench.records.journal import write_text
    from veloxbench.trials.timing_live import read_live
    from veloxbench.trials.timing_record import to_stderr
    from veloxbench.trials.timing_resample import error_rates

    spec = TimingSpec() if canary_drift is None else TimingSpec(canary_drift=canary_drift)
    rates = error_rates(
        series,
        spec,
        default_clock() if clock is None else clock,
        gates=gates,
        seed=seed,
        live=[read_live(path) for path in live_gates or ()],
        message=to_stderr,
    )
    write_text(out, rates.model_dump_json(indent=1) + "\n")


@aa.command()
def report(
    rates: Annotated[Path, typer.Argument(help="A record of error rates, from `veloxbench aa resample`.")],
    out: Annotated[Path | None, typer.Option(help="Write the page here, and its plot beside it.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Compare with this page and the plot beside it; exit 1 if one is stale.")
    ] = None,
) -> None:
    """The page of measured error rates (Markdown and a plot), from their record alone.

    **Examples**

    `veloxbench aa report records/timing-gate/error-rates.json --out docs/gate-error-rates.md`

    `veloxbench aa report records/timing-gate/error-rates.json --check docs/gate-error-rates.md`
    """
    from veloxbench.cli.pages import deliver
    from veloxbench.trials.timing_page import PLOT, plot, render
    from veloxbench.trials.timing_resample import read_error_rates

    found = read_error_rates(rates)
    deliver(render(found), out, check, "veloxbench aa report", rates, {PLOT: plot(found)})


def _setup(core: int | None, threads: int, model: str, depth: int, steps: int, arm_text: str) -> Setup:
    from veloxbench.compare.timed_decode import DecodeSpec
    from veloxbench.methods.registry import checked
    from veloxbench.records.arm import Arm
    from veloxbench.trials.timing_record import Setup

    arm = checked(Arm.parse(arm_text))
    return Setup(DecodeSpec(model=model, arm=arm, depth=depth, steps=steps), threads, core)


def _shares(text: str) -> list[float]:
    from veloxbench.errors import UsageError

    try:
        return [float(part) / 100 for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--slowdown {text!r} must be percents separated by commas, for example 0,5") from error


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
    minutes: Annotated[float, typer.Option(help="Budget of the timings.")] = 30.0,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            help="BLAS threads of each side where timings are taken; 0 leaves them as they are. The published error "
            "rates are those of one thread on one core (`--core`).",
        ),
    ] = 1,
    core: Annotated[int | None, typer.Option(help="Keep both sides on this core (Linux).")] = None,
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
    import os
    import secrets
    import sys

    from veloxbench.cli.gate import print_findings
    from veloxbench.compare.compare import Plan, compare_records, compare_revisions
    from veloxbench.errors import UsageError, unknown_name
    from veloxbench.gate.verdicts import exit_code, sentence
    from veloxbench.report.github import publish
    from veloxbench.trials.timing_record import to_stderr

    if tiers not in ("all", "records", "timing"):
        raise unknown_name("tiers", tiers, ("all", "records", "timing"))
    are_records = [Path(side).exists() for side in (base, head)]
    if all(are_records):
        found = compare_records(Path(base), Path(head), to_stderr)
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
        found = compare_revisions(sides[0], sides[1], plan, to_stderr)
    print_findings(found)
    publish(found, "VeloxBench compare", os.environ)
    print(f"veloxbench compare: {sentence(found)}", file=sys.stderr)
    raise typer.Exit(int(exit_code(found)))


def _timed(text: str, model: str) -> dict[str, DecodeSpec]:
    from veloxbench.compare.timed_decode import DecodeSpec
    from veloxbench.methods.registry import checked
    from veloxbench.records.arm import Arm

    arms = [checked(Arm.parse(part)) for part in text.split(",")]
    return {f"decode of {arm}": DecodeSpec(model=model, arm=arm) for arm in arms}
