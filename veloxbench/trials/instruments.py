"""Trying the instrument: mlx-lm's own affine cache, measured by mlx-quant-fidelity and by the perplexity suite.

Both score every position of the same sequences, each read in one pass by a cache that is quantized from its first
token, which is how mlx-quant-fidelity works (its stress mode). Each runs in its own environment with the mlx-lm that is
installed there, and each computes its own fp16 reference.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from veloxbench.errors import IntegrityError, UnfitEnvironmentError
from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.inputs.models import ModelHandle, load_model
from veloxbench.inputs.transfer_progress import Reporter
from veloxbench.measure.divergence import worker_pool
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.measure.quality import arm_metrics, run_arm
from veloxbench.measure.reference import lockstep
from veloxbench.measure.suite import ArmCaches
from veloxbench.methods.peers import Peer
from veloxbench.methods.registry import BuildContext, build, get_method
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.intervals import mean_interval
from veloxbench.records.journal import parsed, read_content
from veloxbench.records.record import Estimate, Finite
from veloxbench.report.templates import filled
from veloxbench.trials.damages import Measured, measured_on
from veloxquant_kernels.blas import load_blas

REQUIREMENT: Final = "mlx-quant-fidelity==0.10.0"
OTHER: Final = "mlx-quant-fidelity"
BITS: Final = (4, 8)
GROUP_SIZE: Final = 64
FIGURES: Final = {"kld_mean": "KLD, nats a token", "delta_nll": "ΔNLL, nats a token", "changed": "next tokens changed"}


class Comparison(Measured):
    """Figures of both instruments, sequence by sequence.

    Attributes:
        others_versions: of the packages in the other instrument's environment.
        ours, theirs: by bits and figure, one value a sequence.
    """

    others_versions: dict[str, str]
    ours: dict[str, dict[str, tuple[Finite, ...]]]
    theirs: dict[str, dict[str, tuple[Finite, ...]]]

    def difference(self, bits: str, figure: str) -> Estimate:
        """Ours less theirs, with an interval over sequences."""
        return mean_interval(np.subtract(self.ours[bits][figure], self.theirs[bits][figure]), "")


def protocol_of(sequences: int, length: int) -> Chunked:
    """Theirs: one pass over ``length`` tokens, whose last one is a target alone, and every position counts."""
    return Chunked(sequences=sequences, length=length - 1, chunk=length - 1, score_from=0)


def measure(handle: ModelHandle, corpus: str, peer: Peer, protocol: Chunked, reporter: Reporter) -> Comparison:
    """Measure with both instruments.

    Args:
        peer: the other instrument's environment.
        protocol: from :func:`protocol_of`.

    Raises:
        UnfitEnvironmentError: the other instrument ended without an answer; says its last words.
    """
    text = load_text(corpus, "evaluation", reporter=reporter)
    model, tokenizer = load_model(handle)
    block = token_block(text, tokenizer, n_sequences=protocol.sequences, length=protocol.n_tokens + 1)
    context = BuildContext(model, tokenizer, handle.weights_sha256, None, Path())
    ours = {}
    for bits in BITS:
        reporter.message(f"perplexity suite: {bits} bits")
        ours[str(bits)] = _ours(context, Arm(name="mlx-affine", target=float(bits)), block.tokens, protocol)
    reporter.message(f"{OTHER}: {' and '.join(map(str, BITS))} bits")
    theirs = _theirs(peer, handle.directory, block.tokens)
    versions = {OTHER: peer.version, **theirs.pop("versions")}
    sides = {"ours": ours, "theirs": {bits: _by_figure(each) for bits, each in theirs.items()}}
    made = {"measured": datetime.now(UTC), "others_versions": versions, **sides}
    return Comparison.model_validate(measured_on(handle, block, protocol) | made)


def _by_figure(sequences: list[dict[str, float]]) -> dict[str, list[float]]:
    return {figure: [one[figure] for one in sequences] for figure in FIGURES}


def _ours(
    context: BuildContext, arm: Arm, tokens: NDArray[np.int32], protocol: Chunked
) -> dict[str, tuple[float, ...]]:
    """One sequence at a time, as the other instrument does it."""
    found: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    alone = dataclasses.replace(protocol, sequences=1)
    with worker_pool() as pool:
        for row in tokens:
            reference = lockstep(feed(context.model, _caches(context, REFERENCE).caches, row[None], alone), pool)
            caches = _caches(context, arm)
            stats, nll = run_arm(context.model, caches, row[None], alone, reference, pool, lambda _: None)
            samples = arm_metrics(stats, nll, caches.engagement()).samples
            found["kld_mean"] += samples["kld_mean"]
            found["delta_nll"] += samples["delta_nll"]
            found["changed"] += [1 - same for same in samples["top1"]]
    return {figure: tuple(values) for figure, values in found.items()}


def _caches(context: BuildContext, arm: Arm) -> ArmCaches:
    return ArmCaches(*build(context, arm), get_method(arm.name).cache_classes)


def _theirs(peer: Peer, directory: Path, tokens: NDArray[np.int32]) -> dict[str, Any]:
    """The other instrument's answer, and the versions that gave it."""
    request = {
        "model": str(directory),
        "tokens": tokens.tolist(),
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "library": load_blas().path,
    }
    child = subprocess.run(
        [str(peer.python), "-P", str(Path(__file__).with_name("fidelity.py"))],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if child.returncode != 0:
        raise UnfitEnvironmentError(f"{OTHER} ended with {child.returncode}; what it said is above")
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def read_comparison(path: Path) -> Comparison:
    """The record of a comparison.

    Raises:
        IntegrityError: the file is none, or cannot be read.
    """
    return parsed(read_content(path), Comparison.model_validate_json, str(path), "a comparison of instruments")


def render(comparison: Comparison) -> str:
    """The page."""
    rows = []
    for bits in comparison.ours:
        for figure, title in FIGURES.items():
            ours, theirs = (
                mean_interval(np.array(side[bits][figure]), "") for side in (comparison.ours, comparison.theirs)
            )
            apart = comparison.difference(bits, figure)
            rows.append([f"{bits} bits", title, *map(_shown, (ours, theirs, apart))])
    headers = ["cache", "figure", "VeloxBench", OTHER, "difference, sequence by sequence"]
    return filled(
        "veloxbench.trials",
        "instruments.md.j2",
        it=comparison,
        table=tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True),
        apart=[f"{FIGURES[figure]} at {bits} bits" for bits, figure in disagreements(comparison)],
        requirement=REQUIREMENT,
    )


def disagreements(comparison: Comparison) -> list[tuple[str, str]]:
    """Bits and figures whose paired difference is larger than its 95% interval."""
    apart = []
    for bits in comparison.ours:
        for figure in FIGURES:
            low, high = interval_of(comparison.difference(bits, figure))
            if not low <= 0 <= high:
                apart.append((bits, figure))
    return apart


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
