"""Findings as JUnit XML, the form that CI systems show."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from veloxbench.errors import printable
from veloxbench.gate.verdicts import Finding, Verdict


def junit(findings: Sequence[Finding]) -> str:
    """One test case per finding: a regression is a failure, everything else that is no pass an error."""
    failures = sum(finding.verdict is Verdict.REGRESS for finding in findings)
    errors = sum(not finding.passed for finding in findings) - failures
    suite = ET.Element(
        "testsuite", name="veloxbench gate", tests=str(len(findings)), failures=str(failures), errors=str(errors)
    )
    for finding in findings:
        name = printable(f"{finding.subject}: {finding.metric}")
        case = ET.SubElement(suite, "testcase", classname=finding.tier, name=name)
        if not finding.passed:
            kind = "failure" if finding.verdict is Verdict.REGRESS else "error"
            ET.SubElement(case, kind, type=str(finding.verdict), message=printable(finding.reason))
        figures = {name: getattr(finding, name) for name in ("value", "baseline", "change", "low", "high", "limit")}
        known = {name: value for name, value in figures.items() if value is not None}
        if known:
            properties = ET.SubElement(case, "properties")
            for figure, value in known.items():
                ET.SubElement(properties, "property", name=figure, value=repr(value))
    ET.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suite, encoding="unicode") + "\n"
