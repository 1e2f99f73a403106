"""Which lines of ``.metal`` files a block of emulated launches ran, counted by gcov."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from veloxquant_kernels.emulator.build import restore
from veloxquant_kernels.emulator.run import LaunchReport

Lines = dict[int, int]


def _unit_lines(source: Path) -> Lines:
    """How often each executable line of one translation unit ran, over all of its functions."""
    ctypes.CDLL(str(source.with_suffix(".so"))).vq_write_coverage()
    done = subprocess.run(
        ["gcov", "--json-format", "--stdout", source.with_suffix(".gcda").name],
        cwd=source.parent,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    lines: Lines = {}
    for document in done.stdout.splitlines():
        for file in json.loads(document)["files"]:
            if Path(file["file"]).name != source.name:
                continue
            for line in file["lines"]:
                lines[line["line_number"]] = lines.get(line["line_number"], 0) + line["count"]
    return lines


def line_coverage(launches: Iterable[LaunchReport], texts: Mapping[str, str]) -> dict[str, Lines]:
    """How often each executable line ran in launches of a ``coverage`` session.

    Args:
        launches: the session's reports.
        texts: the shipped texts by name; each is found where a translation unit contains it whole.

    Returns:
        For each name, its executable lines (from 1) with their counts; no entry for a text that was never compiled.

    Raises:
        RuntimeError: gcov is not installed.
    """
    if not shutil.which("gcov"):
        raise RuntimeError("line coverage needs gcov, which comes with gcc")
    covered: dict[str, Lines] = {}
    for source in sorted({Path(launch.source_path) for launch in launches}):
        unit = restore(source.read_text(encoding="utf-8"))
        counts = _unit_lines(source)
        for name, text in texts.items():
            at = unit.find(text)
            if at < 0:
                continue
            first = unit.count("\n", 0, at)
            own = covered.setdefault(name, {})
            for line in range(1, text.count("\n") + 1):
                if first + line in counts:
                    own[line] = own.get(line, 0) + counts[first + line]
    return covered
