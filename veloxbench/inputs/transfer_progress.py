"""How long work tells the user where it stands; nothing here is measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Reporter(Protocol):
    """Receives the progress of a download or conversion, one step at a time."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """A step begins; its size in bytes, or None when unknown."""

    def advance(self, n: int) -> None:
        """``n`` more bytes of the current step are done."""

    def done(self) -> None:
        """The current step has ended (also after a failure)."""

    def message(self, text: str) -> None:
        """One line for the user: a licence, a source that was skipped."""


class SilentReporter:
    """Says nothing."""

    def start(self, label: str, total_bytes: int | None) -> None:  # noqa: D102
        pass

    def advance(self, n: int) -> None:  # noqa: D102
        pass

    def done(self) -> None:  # noqa: D102
        pass

    def message(self, text: str) -> None:  # noqa: D102
        pass


class LineReporter(SilentReporter):
    """One plain line on stderr per step, for logs and pipes."""

    def start(self, label: str, total_bytes: int | None) -> None:  # noqa: D102
        size = "" if total_bytes is None else f" ({total_bytes / 1e6:.1f} MB)"
        self.message(f"{label}{size}")

    def message(self, text: str) -> None:  # noqa: D102
        print(text, file=sys.stderr, flush=True)


class RichReporter:
    """A progress bar on the terminal (stderr)."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, label: str, total_bytes: int | None) -> None:  # noqa: D102
        self.done()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.start()
        self._task = self._progress.add_task(label, total=total_bytes)

    def advance(self, n: int) -> None:  # noqa: D102
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n)

    def done(self) -> None:  # noqa: D102
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def message(self, text: str) -> None:  # noqa: D102
        self._console.print(text, highlight=False, markup=False)


def default_reporter() -> Reporter:
    """A progress bar on a terminal, plain lines anywhere else."""
    return RichReporter() if sys.stderr.isatty() else LineReporter()


@contextmanager
def step(reporter: Reporter, label: str, total_bytes: int | None) -> Iterator[None]:
    """``with step(reporter, label, total): ...`` starts a step and always ends it."""
    reporter.start(label, total_bytes)
    try:
        yield
    finally:
        reporter.done()
