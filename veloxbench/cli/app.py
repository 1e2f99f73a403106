"""The program: its commands, its version, and one sentence with an exit code for every problem."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import veloxbench
from veloxbench import __version__
from veloxbench.cli.compare import bisect, compare
from veloxbench.cli.gate import baseline_app, gate
from veloxbench.cli.inputs import corpora, models
from veloxbench.cli.machine import doctor, kernels
from veloxbench.cli.methods import methods
from veloxbench.cli.output import to_stderr
from veloxbench.cli.peers import peers_app
from veloxbench.cli.recommend import recommend
from veloxbench.cli.records import changes, merge, submit, verify
from veloxbench.cli.report import report, schema
from veloxbench.cli.run import run, worker
from veloxbench.cli.trials import trial
from veloxbench.cli.use import HANDS_ON, chat, generate, serve
from veloxbench.errors import ExitCode, UsageError, VeloxError

app = typer.Typer(
    name="veloxbench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def _renamed(context: typer.Context) -> None:
    raise UsageError(f"`veloxbench {context.info_name}` is `veloxbench {RENAMED[str(context.info_name)]}` now")


RENAMED = {"aa": "trial timing", "damages": "trial damages"}
"""Commands by names that they had, and by those that they have."""

for command in (
    *(run, worker, merge, verify, submit, recommend, report, gate, compare, bisect, changes),
    *(models, corpora, methods, doctor, kernels, schema),
):
    app.command()(command)
for door in (generate, chat, serve):
    app.command(context_settings=HANDS_ON)(door)
app.add_typer(baseline_app)
app.add_typer(peers_app)
app.add_typer(trial)
for name in RENAMED:
    app.command(name, hidden=True, add_help_option=False, context_settings=HANDS_ON)(_renamed)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line: one clear sentence and an exit code for every problem, never a traceback."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    gc.set_threshold(100_000)  # ten thousand records are many objects, and all of them stay
    try:
        result: Any = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except typer.TyperException as error:
        to_stderr(f"veloxbench: {error.format_message()} (see veloxbench --help)")
        return int(ExitCode.USAGE)
    except VeloxError as error:
        to_stderr(f"veloxbench: {error}")
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        result = int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.PASS)
    except Exception as error:
        if os.environ.get("VELOXBENCH_TRACEBACK"):
            raise
        to_stderr(f"veloxbench: {blamed(error)}")
        return int(ExitCode.ENVIRONMENT)
    if result == ExitCode.INTERRUPTED:  # typer makes it of Ctrl-C, without a word
        to_stderr("veloxbench: stopped; type the same command again to go on")
    return result if isinstance(result, int) else int(ExitCode.PASS)


def blamed(error: Exception) -> str:
    """What an error that nobody expected says, and of what it is: a file, another distribution, or this program."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for this; a smaller model or shorter texts need less"
    first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    shown = "VELOXBENCH_TRACEBACK=1 shows where"
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    for file in reversed(frames):
        if file.is_relative_to(_OWN) or file.name.startswith("<"):
            break
        distribution = _plugins().get(_top(file))
        if distribution is not None:
            return f"{first} (a defect of {distribution}, in {file}; {shown})"
    return f"{first} (a defect of veloxbench; {shown})"


_OWN = Path(veloxbench.__file__).parent


def _top(file: Path) -> str:
    """The top-level module that a file belongs to: the highest folder that is a package, or the file itself."""
    place = file.with_suffix("")
    while (place.parent / "__init__.py").exists():
        place = place.parent
    return place.name


def _plugins() -> dict[str, str]:
    """Top-level modules of the distributions that bring methods, suites or tables, each with its distribution."""
    points = itertools.chain.from_iterable(dist.entry_points for dist in importlib.metadata.distributions())
    return {
        point.module.partition(".")[0]: f"{point.dist.name} {point.dist.version}"
        for point in points
        if point.group.startswith("veloxbench.") and point.dist is not None and point.dist.name != "veloxbench"
    }


if __name__ == "__main__":
    main()
