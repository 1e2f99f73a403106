"""Has a peer measured in its own environment, within limits of time and memory: what dies there is a reason."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import veloxbench
import veloxquant_kernels
from veloxbench.measure.suite import Bench, Measurement, Tick
from veloxbench.methods.peers import MOVERS, OURS, Peer, get_peer, own_packages
from veloxbench.records.provenance import versions
from veloxbench.run.worker import Answer, Request

WATCH_S = 0.1
"""How often the process is looked at."""


@dataclass(frozen=True)
class Limits:
    """What a measurement may take: seconds, and bytes resident."""

    seconds: float = float("inf")
    resident: float = float("inf")


def measure_apart(item: Measurement, bench: Bench, tick: Tick) -> Answer:
    """A peer's arm measured in the peer's environment.

    The process stays for the next arm of the same peer; where it died or was stopped, that one has a new process.
    """
    peer = get_peer(item.cell.arm.name.partition("/")[0])
    request = Request(
        subject=item.subject,
        arm=item.cell.arm,
        task=item.cell.settings,
        tokens=item.block.tokens.tolist(),
        tokens_sha256=item.block.sha256,
        text=item.block.text,
        role=item.block.role,
        model={**dataclasses.asdict(bench.handle), "directory": str(bench.handle.directory)},
        n_layers=bench.n_layers,
        versions={name: versions()[name] for name in MOVERS},
    )
    limits = Limits(peer.seconds, peer.memory_gib * 2**30)
    return _worker(peer, bench).ask(request, limits, say=bench.say, tick=tick)


_KEPT = "worker apart"


def _worker(peer: Peer, bench: Bench) -> Worker:
    """The worker of a peer, one at a time: another peer's ends, and this one's where it is no more."""
    name = peer.implementation
    kept: Worker | None = bench.kept.get(_KEPT)
    if kept is None or kept.name != name or not kept.lives:
        end_worker(bench)
        bench.kept[_KEPT] = Worker(name, command(peer), environment(peer))
    worker: Worker = bench.kept[_KEPT]
    return worker


def end_worker(bench: Bench) -> None:
    """End the worker that a bench keeps, if any."""
    kept: Worker | None = bench.kept.pop(_KEPT, None)
    if kept is not None:
        kept.close()


def command(peer: Peer) -> list[str]:
    """What starts a peer's worker."""
    packages = {own.__name__: str(Path(str(own.__file__)).parent) for own in (veloxquant_kernels, veloxbench)}
    return [str(peer.python), "-P", str(Path(__file__).with_name("boot.py")), json.dumps(packages)]


def environment(peer: Peer) -> dict[str, str]:
    """This process's variables, without its paths: the environment has its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": os.pathsep.join(own_packages())} if peer.name == OURS else kept


class Worker:
    """A process that answers requests, one after the other, see :mod:`veloxbench.run.worker`."""

    def __init__(self, name: str, start: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (until close)
        self._process = subprocess.Popen(
            start,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, request: Request, limits: Limits, *, say: Callable[[str], None], tick: Tick) -> Answer:
        """The answer to a request; where the process dies or is stopped, one that says why."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ValueError("the worker was started without pipes")
        with _watched(self._process, limits) as stopped, suppress(BrokenPipeError):
            print(request.model_dump_json(), file=stdin, flush=True)
            for line in stdout:
                message: dict[str, Any] = json.loads(line)
                if "say" in message:
                    say(message["say"])
                elif "tick" in message:
                    tick(message["tick"])
                else:
                    return Answer.model_validate(message["answer"])
        code = self._process.wait()
        return Answer(reason=stopped[0] if stopped else self._last_words(code))

    def _last_words(self, code: int) -> str:
        """How the process ended, with the last line that it wrote."""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"its process {how}" + (f": {lines[-1][:300]}" if lines else "")

    def close(self) -> None:
        """End it, its children too."""
        _kill(self._process)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()


@contextmanager
def _watched(process: subprocess.Popen[str], limits: Limits) -> Iterator[list[str]]:
    """Kill a process and its children where it passes a limit; the list then has the reason."""
    stopped: list[str] = []
    done = threading.Event()
    end = time.monotonic() + limits.seconds

    def watch() -> None:
        while not done.wait(WATCH_S):
            if time.monotonic() > end:
                stopped.append(f"stopped after {limits.seconds:g} s, the limit of a measurement")
            elif _resident(process.pid) > limits.resident:
                stopped.append(f"stopped above {limits.resident / 2**30:.3g} GiB resident, the limit of a measurement")
            if stopped:
                _kill(process)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield stopped
    finally:
        done.set()
        watcher.join()


def _resident(pid: int) -> int:
    """Resident bytes of a process and its children."""
    try:
        process = psutil.Process(pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
    except psutil.Error:
        return 0


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
