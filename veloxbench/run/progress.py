"""How a run shows where it stands: a bar with an ETA on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from veloxbench.records.record import Record


class Progress(Protocol):
    """Where a run stands. Amounts are in seconds of estimated work, or in measurements where nobody can estimate."""

    def plan(self, model: str, n_measurements: int, n_done: int, seconds: float | None, detail: str) -> None:
        """A model's work begins: what is there to do and how long it should take, None if that is not known."""

    def begin(self, label: str) -> None:
        """A measurement begins."""

    def advance(self, seconds: float) -> None:
        """That much estimated work is done."""

    def recorded(self, record: Record) -> None:
        """A record is safe on disk."""

    def message(self, text: str) -> None:
        """One line for the user."""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _plan_line(model: str, n_measurements: int, n_done: int, seconds: float | None, detail: str) -> str:
    if n_done == n_measurements or seconds is None:
        return f"{model}: {n_measurements} measurements, {detail}"
    resumed = f", {n_done} of them recorded already" if n_done else ""
    return f"{model}: {n_measurements} measurements{resumed}; about {_clock(seconds)} ({detail})"


def _headline(record: Record) -> str:
    if record.status == "unsupported":
        return record.reason or "not supported"
    shown = ("kld_mean", "kld_floor_mean", "ppl", "bits_per_value", "decode_speed_ratio")
    return ", ".join(f"{name} {record.metrics[name].value:.4g}" for name in shown if name in record.metrics)


class LineProgress:
    """One line per measurement on stderr, with the share done and the time left."""

    def __init__(self) -> None:
        self.total = self.done = 0.0
        self.started = time.monotonic()
        self.label = ""

    def plan(self, model: str, n_measurements: int, n_done: int, seconds: float | None, detail: str) -> None:
        """Print the estimate."""
        self.total = float(n_measurements) if seconds is None else seconds
        self.done, self.started = 0.0, time.monotonic()
        self.message(_plan_line(model, n_measurements, n_done, seconds, detail))

    def begin(self, label: str) -> None:
        """Remember what is being measured."""
        self.label = label

    def advance(self, seconds: float) -> None:
        """Count estimated work."""
        self.done += seconds

    def recorded(self, record: Record) -> None:
        """Print the measurement and the time left at the pace so far."""
        elapsed = time.monotonic() - self.started
        left = elapsed * (self.total / self.done - 1) if self.done > 0 else 0.0
        share = self.done / self.total if self.total else 1.0
        self.message(
            f"[{share:4.0%}, {_clock(left)} left] {self.label} "
            f"({_clock(record.provenance.seconds)}): {_headline(record)}"
        )

    def message(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)


class BarProgress:
    """A bar over estimated seconds, with finished measurements scrolling above it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = bars.Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=None)
        self.label = ""

    def plan(self, model: str, n_measurements: int, n_done: int, seconds: float | None, detail: str) -> None:
        """Print the estimate and reset the bar."""
        self.message(_plan_line(model, n_measurements, n_done, seconds, detail))
        if n_done < n_measurements:
            self.bar.reset(self.task, total=n_measurements if seconds is None else seconds, description=model)
            self.bar.start()

    def begin(self, label: str) -> None:
        """Name the measurement beside the bar."""
        self.label = label
        self.bar.update(self.task, description=label)

    def advance(self, seconds: float) -> None:
        """Move the bar."""
        self.bar.advance(self.task, seconds)

    def recorded(self, record: Record) -> None:
        """Print the measurement above the bar."""
        self.message(f"{self.label} ({_clock(record.provenance.seconds)}): {_headline(record)}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        """Give the terminal back."""
        self.bar.stop()


def default_progress() -> Progress:
    """A bar on a terminal, lines anywhere else."""
    return BarProgress() if sys.stderr.isatty() else LineProgress()
