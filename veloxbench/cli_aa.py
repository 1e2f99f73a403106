"""The commands that measure the timing gate itself, and the command that compares two revisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

aa = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@aa.callback()
def _about() -> None:
    """The timing gate measured by experiment: how often it cries wolf, and how small a slowdown it sees."""


@aa.command()
def record(
    out: Annotated[Path, typer.Option(help="The series' journal (JSON lines); recording goes on where it ended.")],
    hours: Annotated[float, typer.Option(help="Recorded time that the file shall hold in the end.")] = 2.0,
    core: Annotated[
        int | None, typer.Option(help="Keep both sides on this core (Linux), beside other work on the others.")
    ] = None,
    threads: Annotated[int, typer.Option(help="BLAS threads of each side; recorded with the series.")] = 1,
    depth: Annotated[int, typer.Option(help="Tokens in the cache before the timed steps.")] = 128,
    steps: Annotated[int, typer.Option(help="Timed decode steps of a sample.")] = 3,
    method: Annotated[str, typer.Option(help="The cache whose decode is timed, from `veloxbench methods`.")] = (
        "turboquant_mse"
    ),
    target: Annotated[float | None, typer.Option(help="Its target; fp16 has none.")] = 4.0,
) -> None:
    """Record a live A/A series of decode samples, with slowdowns of 2, 3, 5 and 10% made by real extra work.

    Two processes of the same code take turns; each block times both, and the second also with extra work, in a
    random mirrored order with a canary before and after. Stop it at any time and type the same command again.

    **Example:** `veloxbench aa record --hours 2 --out aa.jsonl --core 1`
    """
    from veloxbench.aa.record import RecordSpec, to_stderr
    from veloxbench.aa.record import record as record_series
    from veloxbench.decode_timing import DecodeSpec

    decode = DecodeSpec(method=method, target=None if method == "fp16" else target, depth=depth, steps=steps)
    record_series(RecordSpec(decode=decode, hours=hours, threads=threads, core=core), out, to_stderr)
