"""A recorded A/A series: one journal of blocks in which base and head are the same code, plain and slowed down.

The file holds JSON lines, each written whole and synced: a header, a ``segment`` line at every start of the two
processes, then the blocks of that start. A ``.xz`` file (for committing) is read like the plain one.
"""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue, TypeAdapter

from veloxbench.compare.timed_decode import DecodeSpec
from veloxbench.compare.timing_blocks import TimedBlock
from veloxbench.errors import IntegrityError, UsageError
from veloxbench.records import journal as durable
from veloxbench.records.frozen import Frozen
from veloxbench.records.journal import cut_torn_tail, parsed_lines, read_content, sole_writer

BASE = "base"
"""The slot of the base side; every other slot is the head side's, named by :func:`slot_name`."""

MAX_LAUNCH_S = 60.0
"""A longer time between two starts is a recorder that was stopped: no gate is drawn across it."""


def slot_name(slowdown: float) -> str:
    """``head+5%``; the plain head is ``head+0%``."""
    return f"head+{100 * slowdown:g}%"


class SeriesHeader(Frozen):
    """What a series, or a journal of live gates, times and how: it does not change while the file grows.

    Attributes:
        extra_rows: slowdown -> rows of extra work in every step of that slot.
        implementation: hash of the code that both sides run.
        harness: hash of the code that times them; None in series that were begun before it was kept.
    """

    kind: Literal["series"] = "series"
    schema_version: Literal[1] = 1
    decode: DecodeSpec
    extra_rows: dict[float, int]
    threads: int
    core: int | None
    implementation: str
    harness: str | None = None
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    hardware: dict[str, JsonValue]

    @property
    def slowdowns(self) -> list[float]:
        """Slowdowns of the head's slots, in order; 0 is A/A."""
        return sorted(self.extra_rows)


class Segment(Frozen):
    """Both processes were started anew; ``seed`` drew the orders from here on, ``first`` is the side started first."""

    kind: Literal["segment"] = "segment"
    started: float
    seed: int
    first: str = BASE
    state: dict[str, JsonValue]


Line = Annotated[SeriesHeader | Segment | TimedBlock, Field(discriminator="kind")]
_LINE: TypeAdapter[SeriesHeader | Segment | TimedBlock] = TypeAdapter(Line)


@dataclass(frozen=True)
class Started:
    """One start of a series: its blocks, and the wall time that it took until the first of them."""

    blocks: tuple[TimedBlock, ...]
    launch_seconds: float

    @property
    def seconds(self) -> float:
        """Launch and blocks; a pause between blocks (a sleeping machine) is not counted."""
        return self.launch_seconds + sum(block.seconds for block in self.blocks)


@dataclass(frozen=True)
class Series:
    """A whole series in memory: runs of starts that followed each other."""

    header: SeriesHeader
    runs: tuple[tuple[Started, ...], ...]

    @property
    def starts(self) -> tuple[Started, ...]:
        """All of them in order."""
        return tuple(start for run in self.runs for start in run)

    @property
    def seconds(self) -> float:
        """Recorded time in all."""
        return sum(start.seconds for start in self.starts)


def series_bytes(path: Path) -> bytes:
    """The journal's bytes, decompressed."""
    try:
        return lzma.decompress(read_content(path)) if path.suffix == ".xz" else read_content(path)
    except lzma.LZMAError as error:
        raise IntegrityError(f"{path} cannot be decompressed: {error}") from error


def read_series(path: Path) -> Series:
    """A series from its journal.

    Raises:
        UsageError: there is no such file.
        IntegrityError: a line that is not valid, or no header; names file and line. A last line without its newline
            was being written when the process died; it is left out.
    """
    if not path.is_file():
        raise UsageError(f"there is no series at {path}; `veloxbench trial timing record --out {path}` records one")
    parsed = parsed_lines(path, series_bytes(path), _LINE.validate_json, "a line of a series")
    lines = [line for _, line in parsed]
    if not lines or not isinstance(lines[0], SeriesHeader):
        raise IntegrityError(f"{path} does not begin with the header of a series")
    starts: list[list[TimedBlock]] = []
    for number, line in enumerate(lines[1:], start=2):
        if isinstance(line, SeriesHeader):
            raise IntegrityError(f"{path}:{number} is a second header")
        if isinstance(line, Segment):
            starts.append([])
        elif not starts:
            raise IntegrityError(f"{path}:{number} is a block before any start")
        else:
            starts[-1].append(line)
    return Series(lines[0], _runs([blocks for blocks in starts if blocks]))


def _runs(starts: list[list[TimedBlock]]) -> tuple[tuple[Started, ...], ...]:
    """Starts that followed each other; one after a stop is taken to have cost what the others did."""
    gaps = [
        after[0].started - (before[-1].started + before[-1].seconds) for before, after in itertools.pairwise(starts)
    ]
    launches = [gap for gap in gaps if gap <= MAX_LAUNCH_S]
    usual = sum(launches) / len(launches) if launches else 0.0
    runs: list[list[Started]] = []
    for blocks, gap in zip(starts, [None, *gaps], strict=False):
        follows = gap is not None and gap <= MAX_LAUNCH_S
        if not follows:
            runs.append([])
        runs[-1].append(Started(tuple(blocks), gap if gap is not None and follows else usual))
    return tuple(map(tuple, runs))


def append_line(path: Path, line: BaseModel) -> None:
    """Write a line whole and sync it.

    Raises:
        UnfitEnvironmentError: the disk does not take it.
    """
    durable.append_line(path, json.dumps(line.model_dump(mode="json"), separators=(",", ":")) + "\n")


@contextmanager
def appending(path: Path) -> Iterator[None]:
    """Hold a file for appending, its torn last line (a writer was killed) taken away.

    Raises:
        UnfitEnvironmentError: its folder cannot be written, or another process records into it.
    """
    with sole_writer(path.with_name(f".{path.name}.lock"), f"another process is recording into {path}"):
        if path.exists():
            cut_torn_tail(path)
        yield
