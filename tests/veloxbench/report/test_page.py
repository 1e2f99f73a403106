"""BENCHMARK_RESULTS.md as it is written from the committed records and from synthetic ones."""

from pathlib import Path

import pytest
from gate_records import SOMEWHERE

from veloxbench.records.intervals import ratio_interval
from veloxbench.records.record import Estimate, MethodRef, ModelRef, Provenance, Record, Subject, TextRef
from veloxbench.records.store import read_records
from veloxbench.report.answer import hardware
from veloxbench.report.page import render
from veloxbench.report.tables import GUIDE_CLAIMS

RECORDS = Path(__file__).parents[3] / "records"


def timed(prefill_pairs: int, ratio: Estimate | None = None, provenance: Provenance = SOMEWHERE) -> Record:
    """A throughput record with three decode pairs and a number of prefill pairs."""
    arm = [1.0, 1.1, 1.3, 1.2][:prefill_pairs]
    fp16 = [1.0, 1.2, 1.2, 1.4][:prefill_pairs]
    return Record.create(
        subject=Subject(
            suite="throughput",
            protocol="depth 512",
            model=ModelRef(name="m", weights_sha256="a", tokenizer_sha256="b", config_sha256="c"),
            method=MethodRef(name="x", target=4, target_means="code_bits", implementation="1"),
            text=TextRef(name="t", tokens_sha256="d"),
            settings={"prefill_pairs": prefill_pairs},
            harness="h",
            machine_class="k",
        ),
        status="measured",
        metrics={"prefill_speed_ratio": ratio or ratio_interval(fp16, arm)},
        samples={"prefill_arm": arm, "prefill_fp16": fp16},
        engagement=[],
        provenance=provenance,
    )


@pytest.mark.parametrize("ratio", [None, Estimate(value=1.1, low=0.1, high=8.8, unit="ratio", interval="of then")])
def test_a_ratio_of_two_pairs_stands_with_its_n_and_no_interval(ratio):
    """Also where the record, an older one, carries an interval; three pairs have theirs."""
    page = render([timed(2, ratio)])
    assert "(n=2)" in page
    assert "8.8" not in page
    assert "(n=3)" not in render([timed(3)])


def test_licences_stand_in_the_provenance_where_they_are_known():
    """The model's and the text's, once each; a record without them adds no line and no empty name."""
    licensed = SOMEWHERE.model_copy(update={"model_licence": "Apache-2.0", "text_licence": "CC BY-SA 3.0 / GFDL"})
    page = render([timed(1), *(timed(n, provenance=licensed) for n in (2, 3))])
    assert "Licences: m: Apache-2.0; t: CC BY-SA 3.0 / GFDL.\n" in page
    assert "Licences" not in render([timed(3)])


def test_committed_records_can_be_written():
    """Records from before a rule or a field give a page."""
    records = [record for path in sorted(RECORDS.glob("*.jsonl")) for record in read_records(path)]
    assert "(n=2)" in render(records)


def test_the_committed_page_answers_first():
    """Three sentences, then the charts and the table of targets, before the first table of details."""
    page = (RECORDS.parent / "BENCHMARK_RESULTS.md").read_text(encoding="utf-8")
    order = [
        "**Good enough:**",
        "**Not measured yet:**",
        "<picture>",
        "## Choosing a target",
        "**A Mac?**",
        "### Quality",
    ]
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert page.index("## Provenance") > page.rindex("\n### ")


def test_a_cache_that_holds_fp16_is_no_choice_at_4_bits():
    """mlx-lm's generate at 4 bits loses nothing before token 5000, for it holds 16 until then: another row is named."""
    page = render(read_records(RECORDS / "peers"))
    table = page.partition("## Choosing a target")[2].partition("*target*")[0]
    assert "mlx-lm/generate@4" in page
    assert "mlx-lm/generate@4" not in table
    assert "| 4 |" in " ".join(table.split())


def test_no_table_has_more_than_nine_columns():
    """So that it fits on GitHub's page; what few readers want is in files beside it."""
    pages = [RECORDS.parent / "BENCHMARK_RESULTS.md", *(RECORDS.parent / "docs" / "results").glob("*.md")]
    assert len(pages) >= 3
    for page in pages:
        rules = [
            line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|:") or "-:|" in line
        ]
        assert rules
        assert all(rule.count("|") - 1 <= 9 for rule in rules), page


def test_a_claim_is_kept_or_not():
    """By the worse end: within both limits it is kept, beyond one it is not, an interval across the limit is open."""
    claim = GUIDE_CLAIMS[2.0]
    change = Estimate(value=0.05, low=0.02, high=0.07, unit="PPL")
    assert claim.verdict(change, 8.0, 8.0) == "kept"
    assert claim.verdict(change, 8.0, 4.0) == "kept, tables apart"
    assert claim.verdict(change, 6.2, 6.2) == "not reproduced"
    assert claim.verdict(change.model_copy(update={"high": 0.2}), 8.0, 8.0) == "open"
    assert claim.verdict(Estimate(value=0.3, low=0.2, high=0.4, unit="PPL"), 8.0, 8.0) == "not reproduced"


def test_other_hardware_than_apples_is_said():
    """Without a record of an Apple chip the answer says that there is none; with one it does not."""
    assert "any Apple chip" in hardware([timed(3)])
    apple = SOMEWHERE.model_copy(update={"hardware": {"chip": "Apple M4", "physical_cores": 10}})
    assert "any Apple chip" not in hardware([timed(3), timed(3, provenance=apple)])
