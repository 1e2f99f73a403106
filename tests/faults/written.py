"""Formats of what the project itself writes (records, baselines, journals) and of grids."""

from __future__ import annotations

import functools
import json
import lzma
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "veloxbench"))
PROFILE = "gate"


@functools.cache
def pristine_run() -> tuple[Any, ...]:
    """The records of one run, and baselines that they make."""
    from gate_records import run_records

    from veloxbench.gate.baselines import from_records

    records = run_records()
    return records, from_records(records, "the pristine run", PROFILE)


@functools.cache
def grid() -> Any:
    """The profile of the run."""
    from veloxbench.run.grid import load_grid

    return load_grid(PROFILE)


def run_folder(work: Path) -> Path:
    """A folder as a run leaves it."""
    out = work / "results"
    out.mkdir()
    records = pristine_run()[0]
    (out / "records.jsonl").write_text("".join(record.to_line() for record in records))
    (out / "last-run.json").write_text(json.dumps({"keys": [record.key for record in records], "planned": True}))
    return out


def pristine_files(_: Path) -> None:
    """Make the records before a process of its own is to write them."""
    pristine_run()


def judged(out: Path) -> str:
    """The gate over a folder: it passes for the pristine records alone."""
    from veloxbench.gate.gate import judge
    from veloxbench.gate.verdicts import Verdict, overall
    from veloxbench.records.selection import read_last_run
    from veloxbench.run.plan import current_records

    pristine, baselines = pristine_run()
    records = current_records(grid(), PROFILE, read_last_run(out), out, any_checkout=True)
    if overall(judge(records, baselines, profile=PROFILE)) is not Verdict.PASS:
        return "refused"
    if sorted(record.id for record in records) != sorted(record.id for record in pristine):
        raise AssertionError("the gate passed other records")
    return "healed"


def baseline_files(work: Path) -> list[Path]:
    """The baselines of that run as files."""
    paths = []
    for file in pristine_run()[1].files:
        path = work / "baselines" / file.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.to_text())
        paths.append(path)
    return paths


def read_baselines(work: Path) -> str:
    """What is believed of a baseline is what was approved."""
    from veloxbench.gate import baselines

    read = baselines.read_baselines(work / "baselines")
    if {file.content_sha256 for file in read.files} != {file.content_sha256 for file in pristine_run()[1].files}:
        raise AssertionError("another baseline was believed")
    return "healed"


def failures(work: Path) -> list[Path]:
    """What crashed, beside the records."""
    from datetime import UTC, datetime

    from veloxbench.records.record import FailedMeasurement

    out = run_folder(work)
    records = pristine_run()[0]
    lines = [FailedMeasurement(subject=r.subject, when=datetime.now(UTC), reason="RuntimeError: boom") for r in records]
    (out / "failures.ndjson").write_text("".join(line.model_dump_json() + "\n" for line in lines))
    return [out / "failures.ndjson"]


def read_page(work: Path) -> str:
    """The page is written; its figures are those of the records."""
    from veloxbench.records.selection import read_folders
    from veloxbench.report.page import render

    records, others, failed = read_folders([work / "results"])
    if {record.id for record in records} - {record.id for record in pristine_run()[0]}:
        raise AssertionError("another record stands on the page")
    render(records, failed, others)
    return "followed"


def grid_file(work: Path) -> list[Path]:
    """A grid of the user's."""
    path = work / "mine.toml"
    path.write_text((ROOT / "veloxbench" / "run" / "grids" / "smoke.toml").read_text())
    return [path]


def read_grid(work: Path) -> str:
    """It unfolds into measurements, or says all that is wrong."""
    from veloxbench.run.grid import load_grid
    from veloxbench.run.plan import cells

    list(cells(load_grid(str(work / "mine.toml"))))
    return "followed"


def series(work: Path, name: str) -> list[Path]:
    """The head of a recorded timing series, plain or compressed."""
    content = lzma.decompress((ROOT / "records" / "timing-gate" / "aa.jsonl.xz").read_bytes())
    head = b"".join(content.splitlines(keepends=True)[:40])
    path = work / name
    path.write_bytes(lzma.compress(head) if name.endswith(".xz") else head)
    return [path]


def read_series(work: Path, name: str) -> str:
    """A series, or the line that is none."""
    from veloxbench.trials import timing_series

    timing_series.read_series(work / name)
    return "followed"


def committed(work: Path, name: str) -> list[Path]:
    """A committed record of an experiment."""
    path = work / Path(name).name
    path.write_bytes((ROOT / "records" / name).read_bytes())
    return [path]


def read_error_rates(work: Path) -> str:
    """Error rates whose page can be written."""
    from veloxbench.trials.timing_page import render
    from veloxbench.trials.timing_resample import read_error_rates

    render(read_error_rates(work / "error-rates.json"))
    return "followed"
