"""Findings for a GitHub Actions run: annotations on the run, and the job's summary page.

GitHub drops what exceeds its limits without a word (a summary of a step beyond 1 MiB whole, annotations beyond ten of
a kind), so both are cut here, and say so.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TextIO

from veloxbench.errors import printable
from veloxbench.gate.verdicts import WORST_FIRST, Finding, Verdict, overall
from veloxbench.report.cells import markdown_text

SUMMARY_BYTES: Final = 1 << 20
"""Most that one step may write to its summary."""

ANNOTATIONS: Final = 10
"""Most annotations of one kind that one step may make."""

MESSAGE_CHARACTERS: Final = 2000
"""A sentence, not a log; GitHub takes 4096."""

_KINDS: Final = {Verdict.REGRESS: "error", Verdict.NO_BASELINE: "error", Verdict.INCONCLUSIVE: "warning"}
_HEADER: Final = (
    "| verdict | tier | subject | metric | value | baseline | change | limit | why |\n"
    "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |\n"
)


def annotation_lines(findings: Sequence[Finding], limit: int = ANNOTATIONS) -> list[str]:
    """Workflow commands, at most ``limit`` errors and ``limit`` warnings, worst findings first.

    Where there are more, the last of the kind counts the ones left out.
    """
    lines = []
    for kind in ("error", "warning"):
        of_kind = [finding for finding in _worst_first(findings) if _KINDS.get(finding.verdict) == kind]
        shown = of_kind if len(of_kind) <= limit else of_kind[: limit - 1]
        lines += [_command(kind, f"{f.verdict}: {f.subject}", f"{f.metric}: {f.reason}") for f in shown]
        if len(of_kind) > len(shown):
            left = len(of_kind) - len(shown)
            lines.append(_command(kind, f"{left} more", "the job's summary and the uploaded records have all of them"))
    if not findings:
        lines.append(_command("error", "nothing was judged", "no finding was produced: that is no pass"))
    return lines


def _command(kind: str, title: str, message: str) -> str:
    text = message if len(message) <= MESSAGE_CHARACTERS else message[: MESSAGE_CHARACTERS - 1] + "…"
    return f"::{kind} title={_escaped(title).replace(':', '%3A').replace(',', '%2C')}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return printable(text).replace("%", "%25")


def summary(findings: Sequence[Finding], title: str, room: int = SUMMARY_BYTES) -> str:
    """Markdown of at most ``room`` bytes: the verdict, counts, every finding that did not pass, then the others.

    Args:
        findings: any order.
        title: heading.
        room: bytes left in the step's summary.
    """
    verdict = overall(findings)
    counts = Counter(finding.verdict for finding in findings)
    counted = ", ".join(f"{counts[v]} {v}" for v in WORST_FIRST if counts[v]) or "nothing was judged"
    text = f"## {title}: {verdict}\n\n{counted}\n"
    left_out = "\n{} rows did not fit; the uploaded records have all of them.\n"
    room -= len(text.encode()) + len(left_out.format(len(findings)).encode())
    failed = [finding for finding in _worst_first(findings) if not finding.passed]
    passed = [finding for finding in findings if finding.passed]
    missing = 0
    for chosen, opening, closing in (
        (failed, f"\n{_HEADER}", ""),
        (passed, f"\n<details><summary>{len(passed)} passed</summary>\n\n{_HEADER}", "\n</details>\n"),
    ):
        if not chosen:
            continue
        space = room - len((opening + closing).encode())
        rows = []
        for row in map(_row, chosen):
            space -= len(row.encode())
            if space < 0:
                break
            rows.append(row)
        missing += len(chosen) - len(rows)
        if rows:
            table = opening + "".join(rows) + closing
            room -= len(table.encode())
            text += table
    return text + (left_out.format(missing) if missing else "")


def _row(finding: Finding) -> str:
    numbers = (finding.value, finding.baseline, finding.change, finding.limit)
    shown = ["" if number is None else f"{number:.4g}" for number in numbers]
    if finding.change is not None and finding.low is not None and finding.high is not None:
        shown[2] += f" ({finding.low:.3g} to {finding.high:.3g})"
    cells = [finding.verdict.value, finding.tier, finding.subject, finding.metric, *shown, finding.reason]
    return f"| {' | '.join(map(markdown_text, cells))} |\n"


def _worst_first(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: WORST_FIRST.index(finding.verdict))


def publish(findings: Sequence[Finding], title: str, environ: Mapping[str, str], stream: TextIO | None = None) -> None:
    """On a GitHub runner, print the annotations and append to the step's summary; elsewhere do nothing.

    What cannot be written is said, and changes no verdict.

    Args:
        findings: of one gate.
        title: heading of the summary.
        environ: the process's environment.
        stream: read by GitHub for commands; absent: standard error, since standard output may be JSON.
    """
    stream = sys.stderr if stream is None else stream
    if environ.get("GITHUB_ACTIONS") != "true":
        return
    for line in annotation_lines(findings):
        print(line, file=stream)
    place = environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return
    try:
        path = Path(place)
        used = path.stat().st_size if path.exists() else 0
        with path.open("a", encoding="utf-8") as file:
            file.write(summary(findings, title, SUMMARY_BYTES - used))
    except OSError as error:
        print(_command("warning", "no summary", f"cannot write {place}: {error.strerror}"), file=stream)
