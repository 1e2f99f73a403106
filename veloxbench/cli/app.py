"""The command line: a thin front door over the runner, the reports and the registries."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from veloxbench import __version__
from veloxbench.cli.damages import damages
from veloxbench.cli.gate import add_commands
from veloxbench.cli.trials import aa, compare
from veloxbench.errors import ExitCode, UnfitEnvironmentError, UsageError, VeloxError
from veloxbench.records.journal import write_text
from veloxbench.records.suites import all_suites

if TYPE_CHECKING:
    from veloxbench.records.store import Store

RESULTS = Path("results")
PAGE = "BENCHMARK_RESULTS.md"
HTML_PAGE = "BENCHMARK_RESULTS.html"
INTERRUPTED = 130

app = typer.Typer(
    name="veloxbench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(aa, name="aa")
app.command()(compare)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _numbers(text: str | None, option: str) -> list[float]:
    try:
        return [float(part) for part in _listed(text)]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} must be numbers separated by commas, for example 4,2") from error


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Benchmark and regression tests for KV-cache quantization on MLX.

    Every figure is measured on a real model, through the real cache, in resident bytes, with an interval.

    **Start here:** `veloxbench doctor`, then `veloxbench run --profile quick`.

    Exit codes: 0 done, 1 a measurement failed or a report is stale, 2 inconclusive, 3 baseline, 4 usage,
    5 the environment is unfit (network, disk, a damaged file), 130 interrupted.
    """
    if version:
        print(f"veloxbench {__version__}")
        raise typer.Exit


@app.command()
def run(
    profile: Annotated[
        str,
        typer.Option(
            help="**quick** (minutes), **default** (20 minutes on 2 cores), **full** (hours), or your own FILE.toml."
        ),
    ] = "default",
    models: Annotated[
        str | None,
        typer.Option(help="Names from `veloxbench models`, mlx-lm directories or hub ids, separated by commas."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="From `veloxbench methods`, as `turboquant_mse@4:sinks=4`; without `@` at every target. fp16 is too."
        ),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Code widths or bits_per_value, as the method understands them: `4,2`.")
    ] = None,
    suites: Annotated[str | None, typer.Option(help="Any of " + ", ".join(all_suites()) + ".")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="A name from `veloxbench corpora`, a .txt/.jsonl/.parquet file, or a hub dataset."),
    ] = None,
    out: Annotated[Path, typer.Option(help=f"Folder for the records and {PAGE}.")] = RESULTS,
    memory_budget: Annotated[
        float | None, typer.Option(help="GiB that weights and cache may fill, for *tokens in budget*.")
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Consent to the licence of a model that asks for it.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything anew, also what is recorded already.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the records of this grid as JSON on standard output.")
    ] = False,
) -> None:
    """Measure a model's caches: quality, memory and speed of every method and target.

    Each measurement becomes one record in `OUT/records.jsonl` the moment it ends. Stop the run at any time and
    type the same command again: it goes on where it was. The tables are in `OUT/BENCHMARK_RESULTS.md`, and with
    plots in `OUT/BENCHMARK_RESULTS.html`.

    **Examples**

    `veloxbench run --profile quick`

    `veloxbench run --models ~/models/mine --corpus notes.txt --methods mlx-affine,turboquant_mse --targets 4,2`

    `veloxbench run --models mlx-community/Llama-3.2-3B-Instruct-4bit --suites perplexity`
    """
    from veloxbench.inputs.transfer_progress import default_reporter
    from veloxbench.records.store import JOURNAL, open_store
    from veloxbench.run.grid import customise, load_grid
    from veloxbench.run.progress import BarProgress, default_progress
    from veloxbench.run.runner import run as run_grid

    if (out / JOURNAL).exists():  # until this run knows what it is to measure, nothing in the folder is judged
        with open_store(out) as store:
            store.begin()
    grid = customise(
        load_grid(profile),
        models=_listed(models),
        methods=_listed(methods),
        targets=_numbers(targets, "--targets"),
        suites=_listed(suites),
        corpus=corpus,
        budget_gib=memory_budget,
    )
    progress = default_progress()
    with open_store(out) as store:
        try:
            outcome = run_grid(grid, store, default_reporter(), progress, accept_licence=accept_licence, fresh=fresh)
        finally:
            if isinstance(progress, BarProgress):
                progress.stop()
            write_pages(out, store)
        keys = set(outcome.keys)
        records = [record for record in store.records() if record.key in keys]
    if as_json:
        print(
            json.dumps(
                {
                    "records": [r.model_dump(mode="json") for r in records],
                    "failures": [f.label for f in outcome.failures],
                }
            )
        )
    progress.message(
        f"{outcome.measured} measured, {outcome.resumed} recorded before, {len(outcome.failures)} failed; "
        f"tables in {out / PAGE}"
    )
    raise typer.Exit(int(outcome.exit_code))


@app.command()
def report(
    records: Annotated[
        list[Path] | None, typer.Argument(help="Folders or .jsonl files of records (default: results).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the page here instead of standard output; a name that ends in .html adds plots."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Compare with this page; exit 1 if it is not what the records say.")
    ] = None,
) -> None:
    """Write BENCHMARK_RESULTS.md from records alone.

    **Examples**

    `veloxbench report results`

    `veloxbench report results --out results.html`

    `veloxbench report records --check BENCHMARK_RESULTS.md`
    """
    from veloxbench.cli.pages import deliver
    from veloxbench.records.store import read_failures, read_records
    from veloxbench.report.page import render

    found, failures = {}, {}
    for path in records or [RESULTS]:
        if not path.exists():
            raise UsageError(f"there are no records at {path}; `veloxbench run --out {path}` makes them")
        found.update({record.key: record for record in read_records(path)})
        failures.update({(failure.subject.key, failure.when): failure for failure in read_failures(path)})
    target = out if check is None else check
    if target is not None and target.suffix == ".html":
        from veloxbench.report.html import render_html

        page = render_html(list(found.values()), list(failures.values()))
    else:
        page = render(list(found.values()), list(failures.values()))
    deliver(page, out, check, "veloxbench report", "these records")


@app.command()
def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models to show (default: all that are known by name).")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch, verify and convert the named models now.")
    ] = False,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Consent to the licence of a model that asks for it.")
    ] = False,
) -> None:
    """The models known by name: licence, size, source. Any mlx-lm directory or hub id works in their place.

    **Example:** `veloxbench models --download smollm2-135m`
    """
    from veloxbench.inputs.models import known_models, resolve_model
    from veloxbench.inputs.transfer_progress import default_reporter

    known = known_models()
    if download:
        for name in names or []:
            handle = resolve_model(name, reporter=default_reporter(), accept_licence=accept_licence)
            print(f"{handle.name}: {handle.directory} (weights sha256 {handle.weights_sha256[:16]}…)")
        if not names:
            raise UsageError("name the models to download, for example: veloxbench models --download smollm2-135m")
        return
    for name in names or []:
        if name not in known:
            from veloxbench.errors import unknown_name

            raise unknown_name("model", name, known)
    rows = [
        (
            spec.name,
            spec.architecture,
            f"{spec.context}",
            f"{spec.download_nbytes / 1e6:.0f} MB",
            spec.licence + (" (opt-in)" if spec.opt_in else ""),
            "yes" if spec.is_cached else "no",
            spec.source,
        )
        for spec in known.values()
        if not names or spec.name in names
    ]
    _print_table(("model", "architecture", "context", "download", "licence", "here", "source"), rows)


@app.command()
def corpora() -> None:
    """The texts known by name, with licences. Any .txt, .jsonl or .parquet file or hub dataset works in their place."""
    from veloxbench.inputs.corpora import known_corpora

    rows = [
        (spec.name, spec.description, spec.licence, "yes" if spec.is_cached else "no", spec.source)
        for spec in known_corpora().values()
    ]
    _print_table(("corpus", "what", "licence", "here", "source"), rows)


@app.command()
def methods() -> None:
    """The caches that can be measured, and what a target means to each."""
    from veloxbench.methods.registry import all_methods

    rows = [
        (
            method.name,
            method.summary,
            ", ".join(f"{target:g}" for target in method.targets or ()) or "none",
            method.target_means or "",
            ", ".join(f"{name}={value}" for name, value in method.parameter_defaults().items()),
        )
        for method in all_methods().values()
    ]
    _print_table(("method", "what", "targets", "a target is", "parameters"), rows)


@app.command()
def doctor() -> None:
    """Is this machine fit to measure on? Shows hardware, BLAS with its measured speed, versions, caches and clashes."""
    from veloxbench.run.doctor import examine

    checks = list(examine())
    signs = {True: "ok", False: "UNFIT", None: ""}
    _print_table(("check", "", "found"), [(check.name, signs[check.ok], check.found) for check in checks])
    unfit = [check.name for check in checks if check.ok is False]
    if unfit:
        raise UnfitEnvironmentError(f"not fit: {', '.join(unfit)}")


@app.command()
def kernels(
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run every kernel here and compare it with its plain-MLX definition (a minute)."),
    ] = False,
) -> None:
    """The Metal kernels of the packed caches: their formats, where they can run here, and whether they are right.

    `--verify` runs every line of every kernel on this machine: on the Metal device if it can run, else through the
    CPU emulator, which compiles the same Metal text with the system's C++ compiler and also finds races, accesses out
    of bounds and uninitialised reads. Exit codes: 0 all agree, 1 a kernel is wrong, 5 nothing here can run them.

    **Examples**

    `veloxbench kernels` shows the kernels and their formats

    `veloxbench kernels --verify` checks them on this machine
    """
    from veloxbench.run.doctor import kernel_backends

    places = {check.name: check.found for check in kernel_backends()}
    if not verify:
        _print_kernels(places)
        return
    from veloxquant_kernels.emulator import CompilerNotFound
    from veloxquant_kernels.kernel import why_no_metal
    from veloxquant_kernels.verify import by_kernel
    from veloxquant_kernels.verify import verify as verify_kernels

    with Console(stderr=True).status("starting") as status:
        try:
            outcomes = verify_kernels(before=lambda case: status.update(f"{case.kernel}, {case.name}"))
        except CompilerNotFound as error:
            raise UnfitEnvironmentError(f"{why_no_metal()} here, and no emulator: {error}") from error
    if (problem := why_no_metal()) is not None:
        print(f"Metal cannot run here ({problem}); the CPU emulator {places['emulator']}.\n")
    results = by_kernel(outcomes)
    rows = [
        (
            result.kernel,
            result.backend,
            f"{result.n_cases}",
            "every bit" if result.error == 0 else f"{result.error:.2f} of the bound",
            "FAILED" if result.failures else "ok",
        )
        for result in results
    ]
    _print_table(("kernel", "ran on", "cases", "agrees to", ""), rows)
    failures = [outcome for result in results for outcome in result.failures]
    for outcome in failures:
        reason = outcome.detail or f"error {outcome.error:.3g} times its bound"
        print(f"FAILED {outcome.kernel}, {outcome.case}: {reason}", file=sys.stderr)
    raise typer.Exit(int(ExitCode.REGRESSION if failures else ExitCode.PASS))


@app.command()
def schema() -> None:
    """The JSON Schema of a record line, as published in `schema/record.json`."""
    from veloxbench.records.record import json_schema

    print(json_schema(), end="")


def _print_kernels(places: dict[str, str]) -> None:
    from veloxquant_kernels.kernel import format_contract, shipped_kernels

    _print_table(("backend", "here"), list(places.items()))
    kernels = shipped_kernels()
    shared = sorted({stem for kernel in kernels for stem in kernel.headers})
    for stem in (*(kernel.stem for kernel in kernels), *shared):
        contract = format_contract(stem)
        print(f"\n{stem}.metal: {contract.summary}", *contract.arrays, sep="\n  ")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else 200
    Console(width=wide, highlight=False, markup=False).print(table)


def write_pages(folder: Path, store: Store) -> None:
    """Both pages of a run, as far as there is anything to show."""
    from veloxbench.report.html import render_html
    from veloxbench.report.page import render

    records, failures = store.records(), store.failures()
    if records or failures:
        write_text(folder / PAGE, render(records, failures))
        write_text(folder / HTML_PAGE, render_html(records, failures))


add_commands(app)
app.command()(damages)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line: one clear sentence and an exit code for every problem, never a traceback."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result: Any = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except typer.TyperException as error:
        print(f"veloxbench: {error.format_message()} (see veloxbench --help)", file=sys.stderr)
        return int(ExitCode.USAGE)
    except VeloxError as error:
        print(f"veloxbench: {error}", file=sys.stderr)
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("veloxbench: stopped; type the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.PASS)
    except Exception as error:
        if os.environ.get("VELOXBENCH_TRACEBACK"):
            raise
        first = (str(error).splitlines() or [""])[0]
        print(
            f"veloxbench: {type(error).__name__}: {first} (a defect of veloxbench; VELOXBENCH_TRACEBACK=1 shows where)",
            file=sys.stderr,
        )
        return int(ExitCode.ENVIRONMENT)
    return result if isinstance(result, int) else int(ExitCode.PASS)


if __name__ == "__main__":
    main()
