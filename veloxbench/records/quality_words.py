"""The four words for a loss of quality, and what a measurement must show to earn one. Pure data and one function.

A word is earned by the worst ends of the 95% intervals, not by the means: a measurement that is too short to exclude a
larger loss gets the word of that larger loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veloxbench.errors import unknown_name
from veloxbench.records.record import Estimate


@dataclass(frozen=True)
class QualityWord:
    """A word with the largest loss that it allows.

    Attributes:
        kld_mean: nats per token.
        kld_p99: nats, at the 99% quantile of positions.
        top1: least share of positions whose most likely token stays the same.
        meaning: for readers who know none of the three.
    """

    word: str
    kld_mean: float
    kld_p99: float
    top1: float
    meaning: str


WORDS = (
    QualityWord("lossless", 0.001, 0.01, 0.97, "no loss that a reader or a benchmark would find"),
    QualityWord("good", 0.01, 0.10, 0.92, "a few tokens in a hundred differ, among equally likely ones"),
    QualityWord("noticeable", 0.10, 1.00, 0.78, "answers differ; long or exact tasks suffer"),
    QualityWord("bad", float("inf"), float("inf"), 0.0, "the model is visibly worse"),
)
"""From the best to the worst.

The limits of KLD for good and noticeable are those of mlx-quant-fidelity 0.10 for its good and marginal. Its limits for
changed tokens (1% and 5%) are not taken over: a mean KLD of .05 nats comes with 12% of them in the records here.
"""


def quality_word(metrics: Mapping[str, Estimate]) -> QualityWord | None:
    """The best word whose three limits the worst ends of the intervals keep; None where a figure is missing."""
    try:
        kld, tail, top1 = (metrics[name] for name in ("kld_mean", "kld_p99", "top1_agreement"))
    except KeyError:
        return None
    worst_kld, worst_tail = (estimate.value if estimate.high is None else estimate.high for estimate in (kld, tail))
    worst_top1 = top1.value if top1.low is None else top1.low
    for word in WORDS:
        if worst_kld <= word.kld_mean and worst_tail <= word.kld_p99 and worst_top1 >= word.top1:
            return word
    return WORDS[-1]


def word_named(name: str) -> QualityWord:
    """The word of that name.

    Raises:
        UsageError: another name; the four are listed.
    """
    for word in WORDS:
        if word.word == name:
            return word
    raise unknown_name("verdict", name, [word.word for word in WORDS])
