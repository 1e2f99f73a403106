"""The reference arm's log-probabilities: computed once, kept on disk by content hash, or run in lockstep.

Each step's rows have a checksum. Rows are copied from disk, the copy is checked, and the copy is what is used: a byte
that changed makes the reference be computed anew, from that step on, and never becomes a figure.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxbench.errors import UnfitEnvironmentError
from veloxbench.inputs.sources import cache_lock, move_into_place, writable_cache
from veloxbench.measure.divergence import ReferenceRows, as_rows, reference_rows
from veloxbench.measure.protocol import ScoredLogits
from veloxbench.records.journal import held

DEFAULT_CAP_BYTES = 4 * 2**30
_ROWS, _FIGURES, _META = "log_probs.f16", "figures", "checksums.json"
_FIGURES_TYPE = np.dtype([("normaliser", "<f4"), ("nll", "<f4"), ("top1", "<i4")])
_PARTIAL, _LOCK = ".partial-", ".lock"
_ABANDONED_S = 24 * 3600.0  # where the disk has no locks: an unfinished reference of yesterday is nobody's
_NAME = "reference"
"""The lock under which references are begun and abandoned ones cleared: one begun without it would look abandoned."""


@dataclass(frozen=True)
class ReferenceCache:
    """fp16 log-probabilities on disk under ``folder/<key>``, least recently used out above ``cap_bytes``."""

    folder: Path
    cap_bytes: int = DEFAULT_CAP_BYTES

    def size(self, n_rows: int, vocabulary: int) -> int:
        """Bytes that a reference of that many positions takes."""
        return n_rows * vocabulary * 2

    def fits(self, n_rows: int, vocabulary: int) -> bool:
        """Whether it may be kept: under the cap beside those being written, with a twentieth of the disk left free."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with cache_lock(_NAME):
                unfinished = self._unfinished_bytes()
            disk = shutil.disk_usage(self.folder)
        except (OSError, UnfitEnvironmentError):
            return False  # a cache that is only read
        needed = self.size(n_rows, vocabulary)
        return needed + unfinished <= self.cap_bytes and disk.free - needed > disk.total // 20

    def has(self, key: str) -> bool:
        """Whether the whole reference is there."""
        return (self.folder / key / _META).exists()

    def read(
        self, key: str, rows_per_step: list[int], compute: Callable[[], Iterator[ReferenceRows]]
    ) -> Iterator[ReferenceRows]:
        """The reference of each scored step, from disk as long as its checksums hold.

        Args:
            key: of a reference that :meth:`has`.
            rows_per_step: positions of each scored step.
            compute: the same reference from a pass of the model, where what is kept is damaged or gone; what is damaged
                has been removed when it is called.
        """
        done = 0
        try:
            for rows in self._kept(key, rows_per_step):
                yield rows
                done += 1
            return
        except _DamagedError:
            pass
        yield from itertools.islice(compute(), done, None)

    def _kept(self, key: str, rows_per_step: list[int]) -> Iterator[ReferenceRows]:
        place = self.folder / key
        with ExitStack() as stack:
            try:
                identity = place.stat().st_ino
                with suppress(OSError):  # a cache that is only read
                    os.utime(place)
                meta = json.loads((place / _META).read_text(encoding="utf-8"))
                n_rows, vocabulary = meta["shape"]
                checksums = meta["checksums"]
                if len(checksums) != len(rows_per_step) or n_rows != sum(rows_per_step):
                    raise ValueError("it is of other steps")
                log_probs = stack.enter_context((place / _ROWS).open("rb", buffering=0))
                figures = stack.enter_context((place / _FIGURES).open("rb", buffering=0))
            except _UNREADABLE as error:
                self._remove(place, None)
                raise _DamagedError from error
            for step, n in enumerate(rows_per_step):
                try:
                    halves = np.fromfile(log_probs, "<f2", n * vocabulary).reshape(n, vocabulary)
                    kept = np.fromfile(figures, _FIGURES_TYPE, n)
                    rows = ReferenceRows(halves, *(kept[name].copy() for name in _FIGURES_TYPE.names or ()))
                    if _checksum(key, step, rows) != checksums[step]:
                        raise ValueError("the checksum of a step differs")
                except _UNREADABLE as error:
                    self._remove(place, identity)
                    raise _DamagedError from error
                yield rows

    def _remove(self, place: Path, identity: int | None) -> None:
        """Take a damaged reference away, unless another process has replaced it meanwhile."""
        with cache_lock(_NAME), suppress(OSError):
            if identity is None or place.stat().st_ino == identity:
                shutil.rmtree(place)

    def write(
        self, key: str, steps: Iterator[ScoredLogits | None], n_rows: int, vocabulary: int, pool: ThreadPoolExecutor
    ) -> Iterator[ReferenceRows]:
        """Compute each step's rows, keep them, yield them; the whole appears under ``key`` when all are done.

        Where the disk fails midway, the rows go on being computed and nothing is kept.
        """
        with ExitStack() as stack:
            with cache_lock(_NAME), writable_cache():
                self._make_room(self.size(n_rows, vocabulary))
                partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
                stack.callback(shutil.rmtree, partial, ignore_errors=True)
                stack.enter_context(held(partial / _LOCK))
                log_probs = stack.enter_context((partial / _ROWS).open("wb", buffering=0))
                log_probs.truncate(self.size(n_rows, vocabulary))  # what other writers count with
                figures = stack.enter_context((partial / _FIGURES).open("wb", buffering=0))
            checksums: list[str] = []
            kept = True
            for rows in lockstep(steps, pool):
                try:
                    if kept:
                        _write(log_probs, rows.log_probs)
                        _write(figures, _as_figures(rows))
                        checksums.append(_checksum(key, len(checksums), rows))
                except OSError:
                    kept = False
                yield rows
            if kept:
                with suppress(OSError, UnfitEnvironmentError):
                    meta = {"shape": [n_rows, vocabulary], "checksums": checksums}
                    (partial / _META).write_text(json.dumps(meta), encoding="utf-8")
                    with cache_lock(_NAME):
                        if not self.has(key):
                            move_into_place(partial, self.folder / key)
                            (self.folder / key / _LOCK).unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        needed += self._unfinished_bytes()
        sizes: dict[Path, int] = {}
        for place in self.folder.iterdir():
            if place.name.startswith(_PARTIAL):
                continue
            try:
                (place / _META).stat()
                sizes[place] = (place / _ROWS).stat().st_size
            except OSError:  # not whole, or of a version that kept no checksums
                shutil.rmtree(place, ignore_errors=True)
        for place in sorted(sizes, key=lambda place: place.stat().st_mtime):
            if sum(sizes.values()) + needed <= self.cap_bytes:
                break
            shutil.rmtree(place, ignore_errors=True)
            del sizes[place]

    def _unfinished_bytes(self) -> int:
        """Bytes that other writers hold; what a killed one left (its lock is free) is removed."""
        total = 0
        for partial in self.folder.glob(f"{_PARTIAL}*"):
            try:
                with held(partial / _LOCK, wait=False) as locked:
                    if locked or time.time() - partial.stat().st_mtime > _ABANDONED_S:
                        shutil.rmtree(partial, ignore_errors=True)
            except filelock.Timeout:
                with suppress(FileNotFoundError):  # finished meanwhile
                    total += (partial / _ROWS).stat().st_size
        return total


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, LookupError, OverflowError, RecursionError, MemoryError)


class _DamagedError(Exception):
    """What is kept of a reference is not what was written."""


def _as_figures(rows: ReferenceRows) -> NDArray[np.void]:
    figures = np.empty(len(rows.nll), _FIGURES_TYPE)
    for name in _FIGURES_TYPE.names or ():
        figures[name] = getattr(rows, name)
    return figures


def _write(file: io.FileIO, array: NDArray[Any]) -> None:
    left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while left:
        left = left[file.write(left) :]


def _checksum(key: str, step: int, rows: ReferenceRows) -> str:
    """sha256 of one step's rows, and of whose they are: rows of another reference, or step, are no rows of this one."""
    digest = hashlib.sha256(f"{key} {step} {rows.log_probs.shape}".encode())
    for array in (rows.log_probs, rows.normaliser, rows.nll, rows.top1):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def lockstep(steps: Iterator[ScoredLogits | None], pool: ThreadPoolExecutor) -> Iterator[ReferenceRows]:
    """The reference computed beside the arm, step by step: nothing is kept."""
    for step in steps:
        if step is not None:
            logits = as_rows(step.logits)
            yield reference_rows(logits, step.targets.reshape(-1), np.empty(logits.shape, np.float16), pool)


def vocabulary_of(model: object, tokens: NDArray[np.int32]) -> int:
    """Width of the model's logits, from the shape of a lazy one-token pass."""
    return int(model(mx.array(tokens[:1, :1])).shape[-1])  # type: ignore[operator]
