"""A side of a comparison: a process of its own, kept alive, that does what it is told over a pipe (JSON lines).

``python -m veloxbench.compare.side`` answers one line of JSON per line of JSON. Its standard output belongs to the
answers alone; whatever libraries print goes to its log. :class:`Worker` is the other end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from veloxbench.errors import ExitCode, VeloxError

SAMPLE_TIMEOUT_S = 120.0
WORK_TIMEOUT_S = 3600.0


class WorkerError(VeloxError):
    """A side died, refused or stopped answering: nothing it was asked for was measured."""

    exit_code = ExitCode.REGRESSION


class WorkFailed(WorkerError):
    """What a side was asked for raised there; the side itself lives on.

    Attributes:
        worker: the name of that side's process.
    """

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(f"{worker} {reason}")
        self.worker = worker


def steady_environment(threads: int | None) -> dict[str, str]:
    """Environment variables of both sides that keep starts of the same code from differing more than they must.

    Where the pages of the weights lie is decided anew at every start, with 4 KiB pages much more visibly than with huge
    ones, which glibc asks for where this variable says so (Linux; elsewhere it is ignored). What is left, 2 to 3% from
    start to start, is why a timing gate makes many of them (docs/timing.md).

    Args:
        threads: BLAS threads; None leaves them as they are.
    """
    names = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | ({name: str(threads) for name in names} if threads else {})


class Worker:
    """A side's process. Use it in a ``with`` block: it ends with it."""

    def __init__(
        self,
        name: str,
        *,
        log: Path,
        python: Path | str = sys.executable,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = ("-P", "-m", "veloxbench.compare.side"),
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(python), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                bufsize=1,
                env={**os.environ, **(environment or {})},
            )
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, do: str, *, timeout: float = SAMPLE_TIMEOUT_S, **arguments: Any) -> Any:
        """Send a command and wait for its answer.

        Raises:
            WorkFailed: what it was asked for raised.
            WorkerError: the process died or did not answer in time; says which and where its log is.
        """
        assert self._process.stdin is not None
        request = json.dumps({"do": do, **arguments}) + "\n"
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise WorkerError(f"{self.name} gave no answer to {do!r} in {timeout:g} s (log: {self.log})") from None
        except (OSError, ValueError):  # it died between two commands, or was closed
            line = None
        if line is None:
            status = self._process.wait()
            raise WorkerError(f"{self.name} died in {do!r} with exit status {status} (log: {self.log})")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkFailed(self.name, f"failed in {do!r}: {answer['error']} (log: {self.log})")
        return answer["answer"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Side:
    """What a worker can do; one public method per command, its arguments and answer plain JSON."""

    def __init__(self) -> None:
        self._benchmarks: dict[str, Any] = {}

    def hello(self, packages: Sequence[str] = ()) -> dict[str, Any]:
        """Which code this side runs: the implementation's hash, and the file that each package is imported from."""
        from veloxbench.methods.veloxquant import implementation

        files = {name: str(importlib.import_module(name).__file__) for name in packages}
        return {"implementation": implementation(), "files": files}

    def open_decode(self, name: str, spec: dict[str, Any]) -> None:
        """Load a decode benchmark under a name."""
        from veloxbench.compare.timed_decode import DecodeBenchmark, DecodeSpec

        self._benchmarks[name] = DecodeBenchmark(DecodeSpec.model_validate(spec))

    def extra_rows_at_once(self, name: str) -> int:
        """Rows of extra work that one pass over the matrix holds."""
        rows: int = self._benchmarks[name].extra_rows_at_once
        return rows

    def decode(self, name: str, extra_rows: int = 0) -> dict[str, Any]:
        """One sample."""
        times: dict[str, Any] = self._benchmarks[name].sample(extra_rows).model_dump()
        return times

    def run(self, profile: str, out: str) -> dict[str, Any]:
        """Measure a profile into a folder, where what was measured before counts; keys and failures."""
        from veloxbench.inputs.transfer_progress import default_reporter
        from veloxbench.records.store import open_store
        from veloxbench.run.grid import load_grid
        from veloxbench.run.progress import default_progress
        from veloxbench.run.runner import Run

        grid = load_grid(profile)
        with open_store(Path(out)) as store, Run(grid, store, default_reporter(), default_progress()) as carried:
            outcome = carried.all()
        return {
            "keys": outcome.keys,
            "failures": [(failure.label, failure.reason) for failure in outcome.failures],
        }


def serve(side: object, commands: IO[str], answers: IO[str]) -> None:
    """Answer every line of ``commands`` until they end; an exception is an answer too."""
    for line in commands:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer = {"answer": getattr(side, do)(**request)}
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            answer = {"error": first if isinstance(error, VeloxError) else f"{type(error).__name__}: {first}"}
        print(json.dumps(answer), file=answers, flush=True)


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(_Side(), sys.stdin, answers)


if __name__ == "__main__":
    _main()
