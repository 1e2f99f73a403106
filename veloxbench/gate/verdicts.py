"""What a gate says: one finding per judged metric, and the exit code that a set of findings deserves.

A finding is ``pass`` only where the value is known, finite and inside its limit. Everything else that can
happen (no baseline, another machine's, too few samples, a benchmark that crashed) has a verdict of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from veloxbench.errors import ExitCode

Tier = Literal["exact", "quality", "timing", "gate"]
"""What a finding is about; ``gate``: the gate itself, which could not judge."""


class Verdict(StrEnum):
    """The four things that a gate can say of a metric."""

    PASS = "pass"
    REGRESS = "regress"
    INCONCLUSIVE = "inconclusive"
    NO_BASELINE = "no-baseline"


@dataclass(frozen=True)
class Finding:
    """One metric of one subject, judged.

    Attributes:
        subject: what was measured, as ``smollm2-135m turboquant_mse@4 chunked``.
        reason: one sentence that a reader of a CI log understands without the code.
        change: the estimated change (its unit is the metric's; a ratio for timings), with its interval.
        limit: the change up to which the metric passes.
        detectable: the smallest change that the gate would call a regression 95% of the time.
    """

    tier: Tier
    subject: str
    metric: str
    verdict: Verdict
    reason: str
    value: float | None = None
    baseline: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    detectable: float | None = None

    @property
    def passed(self) -> bool:
        """Whether this finding lets the gate open."""
        return self.verdict is Verdict.PASS


def unjudged(reason: str) -> Finding:
    """The one finding of a gate that could not judge: no pass, whatever the reason."""
    return Finding("gate", "everything", "nothing was judged", Verdict.NO_BASELINE, reason)


_CODES = {
    Verdict.PASS: ExitCode.PASS,
    Verdict.INCONCLUSIVE: ExitCode.INCONCLUSIVE,
    Verdict.NO_BASELINE: ExitCode.BASELINE,
    Verdict.REGRESS: ExitCode.REGRESSION,
}
WORST_FIRST = (Verdict.REGRESS, Verdict.NO_BASELINE, Verdict.INCONCLUSIVE, Verdict.PASS)
"""Verdicts by what they mean for a gate."""


def overall(findings: Sequence[Finding]) -> Verdict:
    """The worst finding; nothing judged is no pass but a missing baseline."""
    if not findings:
        return Verdict.NO_BASELINE
    return min((finding.verdict for finding in findings), key=WORST_FIRST.index)


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """The exit code of :func:`overall`."""
    return _CODES[overall(findings)]


def sentence(findings: Sequence[Finding]) -> str:
    """What a set of findings comes to, in one sentence: the worst one first."""
    if not findings:
        return "no-baseline: nothing was judged"
    verdict = overall(findings)
    if verdict is Verdict.PASS:
        tiers = Counter(finding.tier for finding in findings)
        return (
            "pass: " + ", ".join(f"{count} {tier} findings" for tier, count in tiers.items()) + " within their limits"
        )
    worst = [finding for finding in findings if finding.verdict is verdict]
    first = worst[0]
    others = len([finding for finding in findings if not finding.passed]) - 1
    more = f" (and {others} more)" if others else ""
    return f"{verdict}: {first.tier}, {first.subject}, {first.metric}: {first.reason}{more}"
