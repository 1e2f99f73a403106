"""``veloxbench run``: measure a grid."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from veloxbench.cli.options import AcceptLicence, AsJson
from veloxbench.cli.output import above_zero, listed, numbers, print_table, to_stderr
from veloxbench.errors import ExitCode, Stopped
from veloxbench.records.suites import all_suites

if TYPE_CHECKING:
    from veloxbench.run.grid import Grid
    from veloxbench.run.plan import Shard


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
    out: Annotated[Path, typer.Option(help="Folder for the records and BENCHMARK_RESULTS.md.")] = Path("results"),
    memory_budget: Annotated[
        float | None,
        typer.Option(callback=above_zero, help="GiB that weights and cache may fill, for *tokens in budget*."),
    ] = None,
    accept_licence: AcceptLicence = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure everything anew, also what is recorded already.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="Measure one part of the grid, `2/5`; `veloxbench merge` makes one run of all parts."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Have a pool measure: the address of a dask scheduler, `tcp://host:8786` (docs/pool.md)."),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Measure caches of other projects too (the profile **peers**), installed first."),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print cells, expected minutes and downloads, and measure nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model's caches: quality, memory and speed of every method and target.

    Each measurement becomes one record in `OUT/records.jsonl` the moment it ends. Stop the run at any time and
    type the same command again: it goes on where it was. The answer and the tables are in
    `OUT/BENCHMARK_RESULTS.md`; `OUT/BENCHMARK_RESULTS.html` has charts that answer, in one file without network.

    **Examples**

    `veloxbench run --profile quick`

    `veloxbench run --methods turboquant_mse@4,turboquant_mse@2:sinks=4,mlx-affine@4`

    `veloxbench run --models ~/models/mine --corpus notes.txt --methods mlx-affine,turboquant_mse --targets 4,2`

    `veloxbench run --models mlx-community/Llama-3.2-3B-Instruct-4bit --suites perplexity`

    `veloxbench run --profile default --peers`

    `veloxbench run --profile full --plan`

    `veloxbench run --profile full --shard 2/5 --out part2`, then `veloxbench merge part1 … part5 --out results`

    `veloxbench run --profile full --scheduler tcp://mini.local:8786`, with `veloxbench worker` on each machine
    """
    from veloxbench.inputs.transfer_progress import default_reporter
    from veloxbench.methods.peers import add
    from veloxbench.records.store import JOURNAL, open_store
    from veloxbench.report.files import PAGE, write_pages
    from veloxbench.run.grid import customise, load_grid, missing_peers, peers_grid
    from veloxbench.run.plan import WHOLE, Shard
    from veloxbench.run.progress import BarProgress, default_progress
    from veloxbench.run.runner import Run

    listed(corpus, "--corpus")
    part = WHOLE if shard is None else Shard.parse(shard)
    # until this run knows what it is to measure, nothing in the folder is judged
    if (out / JOURNAL).exists() and not plan:
        with open_store(out) as store:
            store.begin()
    grid = customise(
        load_grid(profile),
        models=listed(models, "--models"),
        methods=listed(methods, "--methods"),
        targets=numbers(targets, "--targets"),
        suites=listed(suites, "--suites"),
        corpus=corpus,
        budget_gib=memory_budget,
    )
    beside = peers_grid(grid) if peers else None
    if plan:
        _print_plan(grid, beside, part, out)
        return
    for requirement in missing_peers(beside) if beside else ():
        default_reporter().message(f"installing {requirement} into an environment of its own")
        add(requirement)
    progress = default_progress()
    with open_store(out) as store:
        try:
            what = (grid, store, default_reporter(), progress)
            how: dict[str, Any] = {"accept_licence": accept_licence, "fresh": fresh, "shard": part, "beside": beside}
            if scheduler is None:
                run_of = Run(*what, **how)
            else:
                from veloxbench.run.pool import PoolRun

                run_of = PoolRun(*what, scheduler=scheduler, **how)
            with run_of as carried:
                try:
                    outcome = carried.all()
                except KeyboardInterrupt:
                    kept = sum(store.get(key) is not None for key in carried.keys)
                    raise Stopped(
                        f"{kept} of {len(carried.keys)} measurements are kept in {out}; "
                        "type the same command again to go on"
                    ) from None
        finally:
            if isinstance(progress, BarProgress):
                progress.stop()
            write_pages(out, store)
        records = [record for key in outcome.keys if (record := store.get(key)) is not None]
    if as_json:
        print(
            json.dumps(
                {
                    "records": [r.model_dump(mode="json") for r in records],
                    "failures": [f.label for f in outcome.failures],
                }
            )
        )
    refused = f"{outcome.unsupported} not supported, " if outcome.unsupported else ""
    progress.message(
        f"{outcome.measured} measured, {refused}{outcome.resumed} recorded before, {len(outcome.failures)} failed; "
        f"tables in {out / PAGE}"
    )
    raise typer.Exit(int(outcome.exit_code))


def worker(
    scheduler: Annotated[str, typer.Argument(help="Address of the dask scheduler: `tcp://host:8786`.")],
) -> None:
    """Measure cells for `veloxbench run --scheduler`, one at a time, until Ctrl-C.

    Start one on each machine of the pool (`dask scheduler` starts the scheduler itself). A machine may have several;
    timings and memory are measured while the others of that machine rest. A worker outlives its scheduler and waits
    for the next one. Whoever reaches the scheduler runs code on its workers: keep it in a network that you trust.

    **Example:** `veloxbench worker tcp://mini.local:8786`
    """
    from veloxbench.run.pool_worker import need_dask, serve

    need_dask()
    signal.signal(signal.SIGINT, lambda *_: _leave())
    serve(scheduler, to_stderr)


def _leave() -> NoReturn:
    to_stderr("veloxbench: stopped; the run gives the cell that was being measured to another worker")
    os._exit(int(ExitCode.INTERRUPTED))


def _print_plan(grid: Grid, beside: Grid | None, shard: Shard, out: Path) -> None:
    """Cells, minutes and downloads of a run that is not carried out."""
    from veloxbench.records.selection import read_folders, shipped_records
    from veloxbench.run.forecast import expected, to_fetch

    here = read_folders([out])[0] if out.exists() else []
    known, grids = read_folders(shipped_records())[0], [each for each in (grid, beside) if each is not None]
    lines = [line for each in grids for line in expected(each, shard, known, here)]
    rows = [
        (
            line.model,
            f"{line.suite}/{line.protocol}",
            f"{line.cells}",
            f"{line.recorded}",
            "no record tells" if line.seconds is None else f"{line.seconds / 60:.1f}",
        )
        for line in lines
    ]
    print_table(("model", "suite", "cells", "recorded", "minutes"), rows)
    told = sum(line.seconds or 0.0 for line in lines)
    unknown = sum(line.cells - line.recorded for line in lines if line.seconds is None)
    left = sum(line.cells - line.recorded for line in lines)
    print(
        f"{left} cells to measure, about {told / 60:.0f} minutes as records of such cells took"
        + (f"; {unknown} cells of kinds that no record tells of" if unknown else "")
    )
    sizes = {each.name: each.nbytes for one in grids for each in to_fetch(one)}.items()
    fetched = [f"{name} ({'size unknown' if size is None else f'{size / 1e6:.0f} MB'})" for name, size in sizes]
    print(f"download: {', '.join(fetched) or 'nothing'}")
