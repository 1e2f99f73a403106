"""Findings on a GitHub Actions run: its commands' escaping, its limits, and nothing lost without a word."""

import io
import json
import re

import pytest
from gate_records import NOW, damage, run_records

from veloxbench.cli.app import _run as veloxbench
from veloxbench.gate.approval import approve, propose
from veloxbench.gate.baselines import Approval
from veloxbench.gate.verdicts import Finding, Verdict
from veloxbench.records.store import JOURNAL
from veloxbench.report.github import ANNOTATIONS, SUMMARY_BYTES, annotation_lines, publish, summary


def finding(verdict=Verdict.REGRESS, subject="smollm2-135m turboquant_mse@4", reason="KLD rose by 12%", **fields):
    return Finding("quality", subject, "kld_mean", verdict, reason, **fields)


def many(count, verdict=Verdict.REGRESS):
    return [finding(verdict, subject=f"arm {i}") for i in range(count)]


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [(Verdict.REGRESS, "error"), (Verdict.NO_BASELINE, "error"), (Verdict.INCONCLUSIVE, "warning")],
)
def test_whatever_is_no_pass_is_annotated(verdict, kind):
    """A regression and a missing baseline are errors; too few samples to decide are a warning."""
    assert [line.split(" ")[0] for line in annotation_lines([finding(verdict)])] == [f"::{kind}"]


def test_a_pass_makes_no_annotation():
    """A green run has nothing to say."""
    assert annotation_lines([finding(Verdict.PASS)]) == []


def test_nothing_judged_is_an_error():
    """An empty gate is red, and says why."""
    assert annotation_lines([])[0].startswith("::error title=nothing was judged::")


def test_a_finding_cannot_write_a_command_of_its_own():
    """It is one line; percent signs are escaped, and colons and commas in a property."""
    line = annotation_lines([finding(subject="a:b,c", reason="100%\n::set-env name=PATH::x\r\n")])[0]
    assert "\n" not in line
    assert "\r" not in line
    assert line.startswith("::error title=regress%3A a%3Ab%2Cc::")
    assert line.endswith("100%25 ::set-env name=PATH::x")


def test_ten_of_a_kind_at_most_and_the_rest_counted():
    """GitHub drops the eleventh error of a step: the tenth says how many there are."""
    lines = annotation_lines(many(25) + many(3, Verdict.INCONCLUSIVE))
    errors = [line for line in lines if line.startswith("::error")]
    assert len(errors) == ANNOTATIONS == 10
    assert errors[-1].startswith("::error title=16 more::")
    assert sum(line.startswith("::warning") for line in lines) == 3
    assert len(annotation_lines(many(10))) == 10
    assert "more" not in annotation_lines(many(10))[-1]


def test_worst_first():
    """Of twenty findings that cannot all be shown, the regression is."""
    lines = annotation_lines([*many(20, Verdict.NO_BASELINE), finding(subject="the bad one")])
    assert "the bad one" in lines[0]


def test_the_summary_stays_within_its_limit_and_says_what_it_left_out():
    """20,000 findings exceed 1 MiB; the page is cut at a row, counts what it lost and keeps the regression."""
    findings = [*many(20_000, Verdict.PASS), finding(subject="the bad one")]
    text = summary(findings, "Gate")
    assert 0.9 * SUMMARY_BYTES < len(text.encode()) <= SUMMARY_BYTES
    assert "the bad one" in text
    lost = int(re.search(r"(\d+) rows did not fit", text)[1])
    assert text.count("\n| regress |") + text.count("\n| pass |") + lost == len(findings)
    assert text.count("<details>") == text.count("</details>") == 1


def test_multibyte_text_counts_in_bytes():
    """The limit is of bytes: a page of two-byte letters is cut earlier."""
    text = summary([finding(reason="é" * 500) for _ in range(100)], "Gate", room=20_000)
    assert 15_000 < len(text.encode()) <= 20_000


def test_a_row_holds_no_markup_of_its_own():
    """A name with a pipe or a tag stays one cell of one row."""
    text = summary([finding(subject="a|b <img src=x>\nc")], "Gate")
    row = next(line for line in text.splitlines() if line.startswith("| regress"))
    assert "a&#124;b &#60;img src=x> c" in row
    assert row.count("|") == 10


def test_the_summary_names_the_verdict_and_the_interval():
    """The heading is the worst verdict; a change is shown with its interval."""
    text = summary([finding(Verdict.PASS), finding(change=0.12, low=0.1, high=0.14)], "Gate")
    assert text.startswith("## Gate: regress\n\n1 regress, 1 pass\n")
    assert "0.12 (0.1 to 0.14)" in text


def test_publish_appends_to_the_step_summary(tmp_path):
    """What the step wrote before stays and counts against the limit."""
    page = tmp_path / "summary.md"
    page.write_text("x" * (SUMMARY_BYTES - 3000))
    stream = io.StringIO()
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)}
    publish(many(100), "Gate", environ, stream)
    assert page.read_text().startswith("xxx")
    assert "## Gate: regress" in page.read_text()
    assert page.stat().st_size <= SUMMARY_BYTES
    assert stream.getvalue().count("::error") == 10


def test_elsewhere_nothing_is_published(tmp_path):
    """Outside a runner there are no commands on standard output and no file."""
    stream = io.StringIO()
    publish(many(3), "Gate", {"GITHUB_STEP_SUMMARY": str(tmp_path / "page")}, stream)
    assert stream.getvalue() == ""
    assert not (tmp_path / "page").exists()


def test_a_summary_that_cannot_be_written_is_said(tmp_path):
    """A full or missing disk does not stop the gate."""
    stream = io.StringIO()
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "missing" / "page")}
    publish([finding(Verdict.PASS)], "Gate", environ, stream)
    assert stream.getvalue().startswith("::warning title=no summary::cannot write")


def test_the_gate_publishes_on_a_runner(tmp_path, monkeypatch, capsys):
    """`veloxbench gate --json` annotates on standard error, so that standard output stays JSON."""
    page, results, baselines = tmp_path / "summary.md", tmp_path / "results", tmp_path / "baselines"
    approval = Approval(who="me", when=NOW, why="a test", commit=None)
    approve(propose(run_records(), baselines, approval, profile="gate"), baselines)
    results.mkdir()
    (results / JOURNAL).write_text("".join(record.to_line() for record in run_records(kld=damage(0.08))))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    code = veloxbench(["gate", "--records", str(results), "--baseline", str(baselines), "--json"])
    said = capsys.readouterr()
    assert code == 1
    assert json.loads(said.out)["verdict"] == "regress"
    assert "::error title=regress" in said.err
    assert page.read_text().startswith("## VeloxBench gate: regress")
