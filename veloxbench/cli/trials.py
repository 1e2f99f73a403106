"""``veloxbench trial``: the gate's own experiments, on timings and on damage of known size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from veloxbench.cli.options import CheckedPage, ModelOption, PageFile
from veloxbench.cli.output import above_zero, deliver, numbers, to_stderr
from veloxbench.errors import UsageError
from veloxbench.records.journal import write_text

if TYPE_CHECKING:
    from veloxbench.trials.timing_record import Setup

trial = typer.Typer(
    name="trial",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Experiments on the gates themselves: what they notice, and how often they are wrong.",
)
timing = typer.Typer(
    name="timing",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="How often the timing gate raises a false alarm, and how small a slowdown it notices, by experiment.",
)
trial.add_typer(timing)

Core = Annotated[
    int | None, typer.Option(min=0, help="Keep both sides on this core (Linux), beside other work on the others.")
]
Threads = Annotated[int, typer.Option(min=1, help="BLAS threads of each side; kept in the file.")]
Depth = Annotated[int, typer.Option(min=2, help="Tokens in the cache before the timed steps.")]
Steps = Annotated[int, typer.Option(min=1, help="Timed decode steps of a sample.")]
ArmText = Annotated[str, typer.Option(help="The cache whose decode is timed, as `turboquant_mse@4`.")]


@timing.command()
def record(
    out: Annotated[Path, typer.Option(help="The series' journal (JSON lines); recording goes on where it ended.")],
    hours: Annotated[
        float, typer.Option(callback=above_zero, help="Recorded time that the file shall hold in the end.")
    ] = 2.0,
    core: Core = None,
    threads: Threads = 1,
    model: ModelOption = "smollm2-135m",
    depth: Depth = 128,
    steps: Steps = 3,
    arm: ArmText = "turboquant_mse@4",
) -> None:
    """Record a live A/A series of decode samples, with slowdowns of 2, 3, 5 and 10% made by real extra work.

    Two processes of the same code take turns; each block times both, and the second also with extra work, in a
    random mirrored order with a canary before and after. After eight blocks of each slowdown both are started anew.
    Stop it at any time and type the same command again.

    **Example:** `veloxbench trial timing record --hours 2 --out aa.jsonl --core 1`
    """
    from veloxbench.trials.timing_record import RecordSpec
    from veloxbench.trials.timing_record import record as record_series

    setup = _setup(core, threads, model, depth, steps, arm)
    record_series(RecordSpec(setup, hours), out, to_stderr)


@timing.command()
def live(
    out: Annotated[Path, typer.Option(help="Journal of the gates; running goes on where it ended.")],
    gates: Annotated[
        int, typer.Option(min=1, help="Gates of each slowdown that the journal shall hold in the end.")
    ] = 20,
    slowdown: Annotated[str, typer.Option(help="Percent of extra work in head, separated by commas; 0 is A/A.")] = (
        "0,5"
    ),
    core: Core = None,
    threads: Threads = 1,
    model: ModelOption = "smollm2-135m",
    depth: Depth = 128,
    steps: Steps = 3,
    arm: ArmText = "turboquant_mse@4",
) -> None:
    """Run whole gates live: the same code on both sides, and head slowed down by real extra work, calibrated first.

    Stop it at any time and type the same command again. Several journals can grow at once, each on a core of its own.

    **Example:** `veloxbench trial timing live --gates 20 --slowdown 0,5 --out live.jsonl --core 1`
    """
    from veloxbench.compare.timed_decode import default_clock
    from veloxbench.compare.timing_test import TimingSpec
    from veloxbench.trials.timing_live import run_live

    setup = _setup(core, threads, model, depth, steps, arm)
    run_live(setup, out, _shares(slowdown), gates, TimingSpec(), default_clock(), to_stderr)


@timing.command()
def resample(
    series: Annotated[Path, typer.Argument(help="A recorded series (.jsonl, or .jsonl.xz).")],
    out: Annotated[Path, typer.Option(help="The record of error rates to write.")] = Path("error-rates.json"),
    gates: Annotated[int, typer.Option(min=1, help="Gates to draw for each slowdown.")] = 1000,
    live_gates: Annotated[
        list[Path] | None, typer.Option("--live", help="Journal of live gates to count as well; may be repeated.")
    ] = None,
    clock: Annotated[Literal["wall", "cpu"] | None, typer.Option(help="Default: as the gate on this device.")] = None,
    canary_drift: Annotated[
        float | None, typer.Option(callback=above_zero, help="Drift of the canary that voids a block.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the gates.")] = 0,
) -> None:
    """Draw gates from a recorded series and count how they end, for every slowdown in it.

    **Example:** `veloxbench trial timing resample aa.jsonl --gates 1000 --out error-rates.json`
    """
    from veloxbench.compare.timed_decode import default_clock
    from veloxbench.compare.timing_test import TimingSpec
    from veloxbench.trials.timing_live import read_live
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


@timing.command()
def report(
    rates: Annotated[Path, typer.Argument(help="A record of error rates, from `veloxbench trial timing resample`.")],
    out: PageFile = None,
    check: CheckedPage = None,
) -> None:
    """The page of measured error rates (Markdown and a plot), from their record alone.

    **Examples**

    `veloxbench trial timing report records/timing-gate/error-rates.json --out docs/gate-error-rates.md`

    `veloxbench trial timing report records/timing-gate/error-rates.json --check docs/gate-error-rates.md`
    """
    from veloxbench.trials.timing_page import PLOT, plot, render
    from veloxbench.trials.timing_resample import read_error_rates

    measured = read_error_rates(rates)
    deliver(render(measured), out, check, "veloxbench trial timing report", rates, {PLOT: plot(measured)})


def _setup(core: int | None, threads: int, model: str, depth: int, steps: int, arm_text: str) -> Setup:
    from veloxbench.compare.timed_decode import DecodeSpec
    from veloxbench.methods.registry import checked
    from veloxbench.records.arm import Arm
    from veloxbench.trials.timing_record import Setup

    arm = checked(Arm.parse(arm_text))
    return Setup(DecodeSpec(model=model, arm=arm, depth=depth, steps=steps), threads, core)


def _shares(text: str) -> list[float]:
    shares = [percent / 100 for percent in numbers(text, "--slowdown")]
    if min(shares) < 0:
        raise UsageError(f"--slowdown {text!r}: extra work is at least 0 percent")
    return shares


@trial.command()
def damages(
    study: Annotated[Path, typer.Option(help="The measured study.")] = Path("records/gate/damages.json"),
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure it anew with the profile's model, text and protocol.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="With --measure: only what the study lacks.")] = False,
    profile: Annotated[str, typer.Option(help="Gives model, text, protocol and the number of arms.")] = "gate",
    out: PageFile = None,
    check: CheckedPage = None,
) -> None:
    """How much damage does the quality gate notice? True sizes on four gates' sequences, verdicts on one gate's each.

    **Examples**

    `veloxbench trial damages --check docs/damages.md`

    `veloxbench trial damages --measure --study mine.json`
    """
    from veloxbench.inputs.models import resolve_model
    from veloxbench.inputs.transfer_progress import default_reporter
    from veloxbench.measure.protocol import Chunked
    from veloxbench.measure.suite import get_suite
    from veloxbench.run.grid import load_grid
    from veloxbench.trials.damages import journal_of, reaches, read_study, trials
    from veloxbench.trials.damages import measure as measure_study
    from veloxbench.trials.damages_page import PLOT, plot, render

    grid = load_grid(profile)
    if measure:
        protocol = next((p for p in grid.tasks(get_suite("perplexity")) if isinstance(p, Chunked)), None)
        if protocol is None:
            raise UsageError(f"profile {profile!r} has no chunked protocol to measure damages with")
        reporter = default_reporter()
        handle = resolve_model(grid.models[0], reporter=reporter)
        journal = study.with_suffix(".part")
        if add and study.exists() and not journal.exists():
            write_text(journal, journal_of(read_study(study)))
        measured = measure_study(handle, grid.corpus, protocol, journal, reporter)
        write_text(study, measured.model_dump_json(indent=1) + "\n")
        journal.unlink()
    if not study.exists():
        raise UsageError(
            f"there is no study at {study}; `veloxbench trial damages --measure --study {study}` makes one"
        )
    taken = read_study(study)
    n_arms = len(grid.arm_list())
    judged = trials(taken, n_arms)
    detectable = reaches(taken, judged, n_arms)
    page = render(taken, judged, detectable, n_arms)
    deliver(page, out, check, "veloxbench trial damages", study, {PLOT: plot(judged, detectable)})


@trial.command()
def travelling(
    record: Annotated[Path, typer.Option(help="The measured settings and how gates between them ended.")] = Path(
        "records/gate/travelling.json"
    ),
    measured: Annotated[
        list[str] | None,
        typer.Option(
            help="SETTING=FOLDER of a run of the gate profile, once for each setting: writes the record anew."
        ),
    ] = None,
    study: Annotated[Path, typer.Option(help="Damages whose measured cost is added.")] = Path(
        "records/gate/damages.json"
    ),
    gates: Annotated[int, typer.Option(min=1, help="Gates to draw of each kind.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Draws the gates.")] = 0,
    resample: Annotated[bool, typer.Option("--resample", help="Draw the gates of the record's settings anew.")] = False,
    out: PageFile = None,
    check: CheckedPage = None,
) -> None:
    """How often is the quality gate wrong where the baseline was measured under another rounding?

    **Examples**

    `veloxbench trial travelling --check docs/travelling.md`

    `MKL_CBWR=AVX2 veloxbench run --profile gate --out a; MKL_CBWR=COMPATIBLE veloxbench run --profile gate --out b`,
    then `veloxbench trial travelling --measured AVX2=a --measured COMPATIBLE=b --record mine.json`
    """
    from veloxbench.trials.damages import read_study
    from veloxbench.trials.travelling import error_rates, read_rates, taken
    from veloxbench.trials.travelling_page import render

    folders = {}
    for each in measured or ():
        name, _, folder = each.partition("=")
        if not name or not folder:
            raise UsageError(f"--measured {each!r} must be SETTING=FOLDER")
        folders[name] = Path(folder)
    if len(folders) == 1:
        raise UsageError("--measured must be given for two settings or more")
    if folders or resample:
        settings = taken(folders) if folders else read_rates(record).settings
        rates = error_rates(settings, read_study(study), gates, seed)
        write_text(record, rates.model_dump_json(indent=1) + "\n")
    deliver(render(read_rates(record)), out, check, "veloxbench trial travelling", record)


@trial.command()
def instruments(
    record: Annotated[Path, typer.Option(help="The measured comparison.")] = Path("records/gate/instruments.json"),
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure it anew; `veloxbench peers add` the other programs first."),
    ] = False,
    model: ModelOption = "smollm2-135m",
    corpus: Annotated[str, typer.Option(help="A name from `veloxbench corpora`, or a file.")] = "wikitext-2",
    sequences: Annotated[int, typer.Option(min=2, help="Sequences to read.")] = 16,
    length: Annotated[int, typer.Option(min=3, help="Tokens of a sequence.")] = 512,
    out: PageFile = None,
    check: CheckedPage = None,
) -> None:
    """Do other instruments see the same? mlx-lm's affine cache by two other programs and by the perplexity suite.

    **Examples**

    `veloxbench trial instruments --check docs/instruments.md`

    `veloxbench trial instruments --measure --record mine.json` (half an hour on two cores)
    """
    from veloxbench.trials.instruments import INSTRUMENTS, protocol_of, read_comparison, render
    from veloxbench.trials.instruments import measure as measure_all

    if measure:
        from veloxbench.inputs.models import resolve_model
        from veloxbench.inputs.transfer_progress import default_reporter
        from veloxbench.methods.peers import get_peer

        peers, reporter = [get_peer(name) for name in INSTRUMENTS], default_reporter()
        handle = resolve_model(model, reporter=reporter)
        compared = measure_all(handle, corpus, peers, protocol_of(sequences, length), reporter)
        write_text(record, compared.model_dump_json(indent=1) + "\n")
    deliver(render(read_comparison(record)), out, check, "veloxbench trial instruments", record)
