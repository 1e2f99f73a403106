"""What commands have in common when they print and write: tables, findings, lines for the user, generated pages."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from veloxbench.errors import ExitCode, UsageError, printable
from veloxbench.records.journal import encoded, read_content, write_text

if TYPE_CHECKING:
    from veloxbench.gate.verdicts import Finding


def to_stderr(text: str) -> None:
    """Print one line for the user, beside what standard output is for."""
    print(*map(printable, text.splitlines()), sep="\n", file=sys.stderr, flush=True)


def above_zero(parameter: typer.CallbackParam, value: float | None) -> float | None:
    """An option's check: a finite number above zero, where it is given.

    Raises:
        UsageError: it is not; names the option.
    """
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"--{str(parameter.name).replace('_', '-')} {value} must be a finite number above zero")
    return value


def listed(text: str | None, option: str) -> list[str]:
    """What an option lists, separated by commas; nothing where it is not given.

    Raises:
        UsageError: it is given, and empty.
    """
    parts = [part.strip() for part in (text or "").split(",")]
    if text is not None and not all(parts):
        raise UsageError(f"{option} {text!r} is empty, or has an empty part: name what is meant, or leave it out")
    return parts if text is not None else []


def numbers(text: str | None, option: str) -> list[float]:
    """The finite numbers that an option lists, see :func:`listed`.

    Raises:
        UsageError: it lists something else.
    """
    try:
        values = [float(part) for part in listed(text, option)]
    except ValueError:
        values = [float("nan")]
    if not all(map(math.isfinite, values)):
        raise UsageError(f"{option} {text!r} must be numbers separated by commas, for example 4,2")
    return values


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; into a file or a pipe it is 200 characters wide."""
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(printable, row))
    _console().print(table)


MOST_ROWS = 500
"""Metrics that passed, up to which each has its row."""


def print_findings(findings: Sequence[Finding]) -> None:
    """A table: every quality metric (of many, those that did not pass), and of the exact tier what is not equal."""
    header = ("tier", "subject", "metric", "baseline", "now", "change", "limit", "detects", "verdict")
    rows = []
    passed = Counter(finding.tier for finding in findings if finding.passed)
    counted = [tier for tier, count in passed.items() if tier == "exact" or count > MOST_ROWS]
    for finding in findings:
        if finding.passed and finding.tier in counted:
            continue
        change = _figure(finding.change)
        if finding.low is not None and finding.high is not None:
            change += f" [{finding.low:.3g}, {finding.high:.3g}]"
        row = (
            finding.tier,
            finding.subject,
            finding.metric,
            _figure(finding.baseline),
            _figure(finding.value),
            change,
            _figure(finding.limit),
            _figure(finding.detectable),
            str(finding.verdict),
        )
        rows.append(row)
    for tier in counted:
        what, change, limit = ("subjects", "none", "0") if tier == "exact" else ("metrics", "", "")
        rows.append((tier, f"{passed[tier]} {what}", "all", "", "", change, limit, "", "pass"))
    print_table(header, rows)
    for finding in findings:
        if not finding.passed:
            sentence = f"{finding.verdict}: {finding.subject}, {finding.metric}: {finding.reason}"
            _console().print(printable(sentence), soft_wrap=True)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def deliver(
    page: str | bytes,
    out: Path | None,
    check: Path | None,
    command: str,
    source: Path | str,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Compare the page with ``check``, or write it to ``out``, or print it.

    Args:
        command: what writes the page from ``source``, named where a file is stale.
        figures: files that belong beside the page, by their path from its folder, compared and written with it.
    Raises:
        typer.Exit: with :attr:`ExitCode.REGRESSION`, a compared file is stale.
    """
    target = check or out
    if target is None:
        print(page if isinstance(page, str) else page.decode("utf-8"), end="")
        return
    files: dict[Path, str | bytes] = {target: page} | {
        target.parent / name: text for name, text in (figures or {}).items()
    }
    if check is None:
        for path, text in files.items():
            if path != target:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        return
    stale = [path for path, text in files.items() if not path.exists() or read_content(path) != encoded(text)]
    for path in stale:
        to_stderr(f"{path} is stale: it is not what `{command}` writes from {source}")
    if stale:
        raise typer.Exit(int(ExitCode.REGRESSION))
