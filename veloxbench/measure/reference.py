"""The reference arm's log-probabilities: computed once, kept on disk by content hash, or run in lockstep."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxbench.inputs.sources import cache_lock
from veloxbench.measure.divergence import ReferenceRows, as_rows, reference_rows
from veloxbench.measure.protocol import ScoredLogits

DEFAULT_CAP_BYTES = 4 * 2**30
_ROWS, _STATS, _META = "log_probs.f16", "stats.npz", "meta.json"
_PARTIAL, _LOCK = ".partial-", ".lock"
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
        self.folder.mkdir(parents=True, exist_ok=True)
        with cache_lock(_NAME):
            unfinished = self._unfinished_bytes()
        disk = shutil.disk_usage(self.folder)
        needed = self.size(n_rows, vocabulary)
        return needed + unfinished <= self.cap_bytes and disk.free - needed > disk.total // 20

    def has(self, key: str) -> bool:
        """Whether the whole reference is there."""
        return (self.folder / key / _META).exists()

    def read(self, key: str, rows_per_step: list[int]) -> Iterator[ReferenceRows]:
        """The reference of each scored step, mapped from disk."""
        place = self.folder / key
        os.utime(place)
        shape = tuple(json.loads((place / _META).read_text())["shape"])
        log_probs = np.memmap(place / _ROWS, np.float16, "r", shape=shape)
        with np.load(place / _STATS) as stats:
            normaliser, nll, top1 = stats["normaliser"], stats["nll"], stats["top1"]
        start = 0
        for n in rows_per_step:
            rows = slice(start, start + n)
            yield ReferenceRows(log_probs[rows], normaliser[rows], nll[rows], top1[rows])
            start += n

    def write(
        self, key: str, steps: Iterator[ScoredLogits | None], n_rows: int, vocabulary: int, pool: ThreadPoolExecutor
    ) -> Iterator[ReferenceRows]:
        """Compute each step's rows, keep them, yield them; the whole appears under ``key`` when all are done."""
        with cache_lock(_NAME):
            self._make_room(self.size(n_rows, vocabulary))
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
            held = filelock.FileLock(partial / _LOCK, thread_local=False)
            held.acquire()
        try:
            log_probs = np.memmap(partial / _ROWS, np.float16, "w+", shape=(n_rows, vocabulary))
            parts: list[ReferenceRows] = []
            start = 0
            for step in steps:
                if step is None:
                    continue
                logits, targets = as_rows(step.logits), step.targets.reshape(-1)
                rows = reference_rows(logits, targets, log_probs[start : start + len(targets)], pool)
                start += len(targets)
                parts.append(rows)
                yield rows
            np.savez(
                partial / _STATS,
                normaliser=np.concatenate([part.normaliser for part in parts]),
                nll=np.concatenate([part.nll for part in parts]),
                top1=np.concatenate([part.top1 for part in parts]),
            )
            (partial / _META).write_text(json.dumps({"shape": [n_rows, vocabulary], "written": time.time()}))
            if not self.has(key):
                partial.replace(self.folder / key)
                (self.folder / key / _LOCK).unlink(missing_ok=True)
        finally:
            held.release()
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, needed: int) -> None:
        needed += self._unfinished_bytes()
        kept = sorted(
            (place for place in self.folder.iterdir() if (place / _META).exists()), key=lambda p: p.stat().st_mtime
        )
        sizes = {place: (place / _ROWS).stat().st_size for place in kept}
        for place in kept:
            if sum(sizes.values()) + needed <= self.cap_bytes:
                break
            shutil.rmtree(place, ignore_errors=True)
            del sizes[place]

    def _unfinished_bytes(self) -> int:
        """Bytes that other writers hold; what a killed one left (its lock is free) is removed."""
        total = 0
        for partial in self.folder.glob(f"{_PARTIAL}*"):
            try:
                with filelock.FileLock(partial / _LOCK, timeout=0):
                    shutil.rmtree(partial, ignore_errors=True)
            except filelock.Timeout:
                with suppress(FileNotFoundError):  # finished meanwhile
                    total += sum(file.stat().st_size for file in partial.iterdir())
        return total


def lockstep(steps: Iterator[ScoredLogits | None], pool: ThreadPoolExecutor) -> Iterator[ReferenceRows]:
    """The reference computed beside the arm, step by step: nothing is kept."""
    for step in steps:
        if step is not None:
            logits = as_rows(step.logits)
            yield reference_rows(logits, step.targets.reshape(-1), np.empty(logits.shape, np.float16), pool)


def vocabulary_of(model: object, tokens: NDArray[np.int32]) -> int:
    """Width of the model's logits, from the shape of a lazy one-token pass."""
    return int(model(mx.array(tokens[:1, :1])).shape[-1])  # type: ignore[operator]
