"""Trying the instrument: mlx-lm's own affine cache, measured by other programs and by the perplexity suite.

All score every position of the same sequences, each read in one pass by a cache that is quantized from its first
token: the stress mode of mlx-quant-fidelity, the axis KLD@D of refract-llm. Each runs in its own environment with the
mlx-lm that is installed there, and each computes its own fp16 reference.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from math import exp
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator
from tabulate import tabulate

from veloxbench.errors import IntegrityError, UnfitEnvironmentError
from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.inputs.models import ModelHandle
from veloxbench.inputs.transfer_progress import Reporter
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.measure.quality import arm_metrics, run_arm
from veloxbench.measure.reference import lockstep
from veloxbench.measure.suite import Bench
from veloxbench.methods.peers import Peer
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.frozen import Frozen
from veloxbench.records.intervals import mean_interval
from veloxbench.records.journal import parsed, read_content
from veloxbench.records.record import Estimate, Finite
from veloxbench.report.templates import filled
from veloxbench.run.progress import LineProgress
from veloxbench.run.session import opened
from veloxbench.trials import instruments_worker
from veloxbench.trials.damages import Measured, measured_on
from veloxquant_kernels.blas import load_blas

INSTRUMENTS: Final = {"mlx-quant-fidelity": "0.10.0", "refract-llm": "0.3.2.3"}
"""The other programs, and of each the version that the worker was written for."""

BITS: Final = (4, 8)
GROUP_SIZE: Final = 64
FIGURES: Final = {"kld_mean": "KLD, nats a token", "delta_nll": "ΔNLL, nats a token", "changed": "next tokens changed"}

Figures = dict[str, dict[str, tuple[Finite, ...]]]
"""By bits and figure, one value a sequence."""


class Other(Frozen):
    """What another instrument says.

    Attributes:
        versions: of the packages in its environment, its own among them.
        figures: those of :data:`FIGURES` that it has.
    """

    versions: dict[str, str]
    figures: Figures


@dataclasses.dataclass(frozen=True)
class Pair:
    """One figure of one cache by another instrument and by ours.

    Attributes:
        apart: ours less theirs, paired sequence by sequence.
    """

    other: str
    bits: str
    figure: str
    ours: Estimate
    theirs: Estimate
    apart: Estimate


class Comparison(Measured):
    """Figures of all instruments, sequence by sequence."""

    ours: Figures
    others: dict[str, Other]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        for name, other in self.others.items():
            for bits, figure in itertools.product(other.figures, FIGURES):
                theirs, ours = (len(side.get(bits, {}).get(figure, ())) for side in (other.figures, self.ours))
                if theirs not in (0, ours):
                    raise ValueError(f"{theirs} sequences of {figure} at {bits} bits by {name}, and {ours} of ours")
        return self

    def pairs(self) -> Iterator[Pair]:
        """Every figure that another instrument has, ours beside it."""
        for name, other in self.others.items():
            for bits, figure in itertools.product(other.figures, FIGURES):
                if theirs := other.figures[bits].get(figure):
                    ours = self.ours[bits][figure]
                    each = (mean_interval(values, "") for values in (ours, theirs, np.subtract(ours, theirs)))
                    yield Pair(name, bits, figure, *each)


def protocol_of(sequences: int, length: int) -> Chunked:
    """Theirs: one pass over ``length`` tokens, whose last one is a target alone, and every position counts."""
    return Chunked(sequences=sequences, length=length - 1, chunk=length - 1, score_from=0)


def measure(
    handle: ModelHandle, corpus: str, peers: Sequence[Peer], protocol: Chunked, reporter: Reporter
) -> Comparison:
    """Measure with all instruments.

    Args:
        peers: the other instruments' environments.
        protocol: from :func:`protocol_of`.

    Raises:
        UnfitEnvironmentError: another instrument ended without an answer; says its last words.
        IntegrityError: its answer is none.
    """
    text = load_text(corpus, "evaluation", reporter=reporter)
    with opened(handle, None, LineProgress()) as bench:
        block = token_block(text, bench.context.tokenizer, n_sequences=protocol.sequences, length=protocol.n_tokens + 1)
        ours = _ours(bench, block.tokens, protocol)
    others = {}
    for peer in peers:
        reporter.message(peer.name)
        others[peer.name] = _theirs(peer, handle.directory, block.tokens)
    made = {"measured": datetime.now(UTC), "ours": ours, "others": others}
    return Comparison.model_validate(measured_on(handle, block, protocol) | made)


def _ours(bench: Bench, tokens: NDArray[np.int32], protocol: Chunked) -> dict[str, dict[str, list[float]]]:
    """One sequence at a time, as the other instruments do it."""
    figures: dict[str, dict[str, list[float]]] = {str(bits): {figure: [] for figure in FIGURES} for bits in BITS}
    alone = dataclasses.replace(protocol, sequences=1)
    for at, row in enumerate(tokens, start=1):
        bench.say(f"perplexity suite: {at} of {len(tokens)}")
        reference = list(lockstep(feed(bench.model, bench.caches(REFERENCE).caches, row[None], alone), bench.pool))
        for bits, of_width in figures.items():
            caches = bench.caches(Arm(name="mlx-affine", target=float(bits)))
            stats, nll = run_arm(bench.model, caches, row[None], alone, iter(reference), bench.pool, lambda _: None)
            samples = arm_metrics(stats, nll, caches.engagement()).samples
            of_width["kld_mean"] += samples["kld_mean"]
            of_width["delta_nll"] += samples["delta_nll"]
            of_width["changed"] += [1 - same for same in samples["top1"]]
    return figures


def _theirs(peer: Peer, directory: Path, tokens: NDArray[np.int32]) -> Other:
    request = {
        "instrument": peer.name,
        "model": str(directory),
        "tokens": tokens.tolist(),
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "library": load_blas().path,
    }
    child = subprocess.run(
        [str(peer.python), "-P", str(instruments_worker.__file__)],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if child.returncode != 0:
        raise UnfitEnvironmentError(f"{peer.name} ended with {child.returncode}; what it said is above")
    answer = "".join(child.stdout.splitlines()[-1:]).encode()
    return parsed(answer, Other.model_validate_json, f"the last line of {peer.name}", "an instrument's answer")


def read_comparison(path: Path) -> Comparison:
    """The record of a comparison.

    Raises:
        IntegrityError: the file is none, or cannot be read.
    """
    return parsed(read_content(path), Comparison.model_validate_json, str(path), "a comparison of instruments")


def render(comparison: Comparison) -> str:
    """The page."""
    pairs = list(comparison.pairs())
    rows = [
        [f"{pair.bits} bits", FIGURES[pair.figure], pair.other, *map(_shown, (pair.theirs, pair.ours, pair.apart))]
        for pair in pairs
    ]
    headers = ["cache", "figure", "other program", "its figure", "VeloxBench", "difference, sequence by sequence"]
    return filled(
        "veloxbench.trials",
        "instruments.md.j2",
        it=comparison,
        table=tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True),
        apart=[f"{FIGURES[pair.figure]} at {pair.bits} bits by {pair.other}" for pair in disagreements(pairs)],
        points={pair.bits: 100 * exp(-pair.theirs.value) for pair in pairs if pair.other == "refract-llm"},
    )


def disagreements(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose paired difference is larger than its 95% interval."""
    bounds = [(pair, *interval_of(pair.apart)) for pair in pairs]
    return [pair for pair, low, high in bounds if not low <= 0 <= high]


def interval_of(estimate: Estimate) -> tuple[float, float]:
    """Of a mean over sequences.

    Raises:
        IntegrityError: there is none, of fewer than two sequences.
    """
    if estimate.low is None or estimate.high is None:
        raise IntegrityError("a comparison of instruments needs two sequences of each figure, or it has no interval")
    return estimate.low, estimate.high


def _shown(estimate: Estimate) -> str:
    low, high = interval_of(estimate)
    return f"{estimate.value:.3g} ± {(high - low) / 2:.2g}"
