"""The gates, after everything was measured: one item per subject of the baselines, and one for the whole.

They fail by ``pytest.fail``, not by ``assert``, which Python leaves out under ``-O``.
"""

import pytest

from veloxbench.gate.verdicts import Finding, Verdict, overall, sentence

SUITE = "gate"


def must_pass(findings: list[Finding]) -> None:
    if overall(findings) is not Verdict.PASS:
        pytest.fail(sentence(findings), pytrace=False)


def test_subject_is_as_good_as_its_baseline(
    gated_subject: tuple[str, str], gate_findings: list[Finding], request: pytest.FixtureRequest
) -> None:
    """Each subject of the baselines was produced, and every metric of it passes."""
    tier, subject = gated_subject
    findings = [finding for finding in gate_findings if (finding.tier, finding.subject) == (tier, subject)]
    for finding in findings:
        for name in ("value", "baseline", "change", "low", "high", "limit", "detectable"):
            figure = getattr(finding, name)
            if figure is not None:
                request.node.user_properties.append((f"{finding.metric}.{name}", figure))
    must_pass(findings)


def test_gate_is_open(gate_findings: list[Finding]) -> None:
    """Nothing measured is without a baseline, and nothing of the baselines is missing."""
    must_pass(gate_findings)
