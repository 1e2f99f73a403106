"""The process in which a peer's arms are measured, in the peer's environment.

It reads each :class:`Request` as one line of JSON and answers in lines of JSON: ``{"say": …}`` and ``{"tick": …}``
while it measures, then an :class:`Answer`. What the measured code prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, TypeAdapter

from veloxbench.errors import VeloxError
from veloxbench.inputs.corpora import Role, TokenBlock
from veloxbench.inputs.models import ModelHandle
from veloxbench.measure.suite import Measured, Measurement, cell_of, get_suite
from veloxbench.records.arm import Arm
from veloxbench.records.frozen import Frozen
from veloxbench.records.provenance import versions
from veloxbench.records.record import Estimate, LayerEngagement, Subject, content_hash

if TYPE_CHECKING:
    from veloxbench.run.session import OnBench

MODULES = {
    "perplexity": "veloxbench.measure.quality",
    "holds": "veloxbench.measure.holds",
    "throughput": "veloxbench.measure.throughput",
}
"""The suites that measure arms of peers, and where they are: nothing else is imported in a peer's environment."""


Send = Callable[[dict[str, Any]], None]


class Request(Frozen):
    """A measurement with all that it reads; ``versions`` are those of the libraries where it was planned."""

    subject: Subject
    arm: Arm
    task: dict[str, Any]
    tokens: list[list[int]]
    tokens_sha256: str
    text: str
    role: Role
    model: dict[str, Any]
    n_layers: int | None
    versions: dict[str, str]


class Answer(Frozen):
    """What came of it: figures, or a reason why there are none."""

    reason: str | None = None
    trace: str | None = None
    metrics: dict[str, Estimate] = Field(default_factory=dict)
    samples: dict[str, list[float]] = Field(default_factory=dict)
    layers: list[LayerEngagement] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


def measured(request: Request, on_bench: OnBench, send: Send) -> Measured:
    """Measure a request in this process."""
    importlib.import_module("veloxbench.methods.fp16")
    suite = get_suite(request.subject.suite)
    cell = cell_of(suite, request.task, request.arm)
    tokens = np.array(request.tokens, np.int32)
    block = TokenBlock(tokens, request.tokens_sha256, request.text, request.role, (), False, None)
    item = Measurement(_here(request), cell, block)
    bench = on_bench.of(TypeAdapter(ModelHandle).validate_python(request.model), request.n_layers)
    return suite.measure(item, bench, lambda n: send({"tick": n}))


def _here(request: Request) -> Subject:
    """The subject by which the fp16 reference is kept: another where this environment has other libraries."""
    others = {name: versions()[name] for name in request.versions if versions()[name] != request.versions[name]}
    if not others:
        return request.subject
    machine_class = content_hash([request.subject.machine_class, others])
    return request.subject.model_copy(update={"machine_class": machine_class})


class _Said:
    """Where a run stands, told to the process that asked."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def message(self, text: str) -> None:
        """One line for the user."""
        self.send({"say": text})

    def plan(self, *_: object) -> None:
        """Not told."""

    begin = advance = recorded = plan


def why(error: BaseException) -> str:
    """What went wrong, in one line, and where in the measured code."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, VeloxError):
        return first
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""  # noqa: PTH119
    return f"{type(error).__name__}: {first}{place}"


def answer(line: str, on_bench: OnBench, send: Send) -> Answer:
    """The answer to a request: never an exception, for whatever the measured code raises is a finding."""
    try:
        request = Request.model_validate_json(line)
        importlib.import_module(MODULES[request.subject.suite])
        result = measured(request, on_bench, send)
    except Exception as error:
        return Answer(reason=why(error), trace=traceback.format_exc(), versions=versions())
    return Answer(metrics=result.metrics, samples=result.samples, layers=result.layers, versions=versions())


def _outlive_nobody(parent: int) -> None:
    """End this process when the one that asked is gone, however long a measurement still takes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Answer every request from standard input."""
    from veloxbench.run.session import OnBench  # which asks this module for the form of a request

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    threading.Thread(target=_outlive_nobody, args=(os.getppid(),), daemon=True).start()
    on_bench = OnBench(_Said(send))
    for line in sys.stdin:
        send({"answer": answer(line, on_bench, send).model_dump(mode="json")})
