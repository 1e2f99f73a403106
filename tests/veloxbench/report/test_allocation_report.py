"""The report's verdicts on bit allocations, on records whose answers are known."""

import numpy as np
import pytest
from gate_records import SOMEWHERE

from veloxbench.records.record import Estimate, MethodRef, ModelRef, Record, Subject, TextRef
from veloxbench.records.selection import table_rows
from veloxbench.report.allocation import comparisons
from veloxbench.report.page import pages


def arm(name, target, bits, kld, text="t", **parameters):
    """A quality record with the given KLD of each sequence."""
    return Record.create(
        subject=Subject(
            suite="perplexity",
            protocol="chunked",
            model=ModelRef(name="m", weights_sha256="a", tokenizer_sha256="b", config_sha256="c"),
            method=MethodRef(
                name=name, target=target, target_means="bits_per_value", parameters=parameters, implementation="1"
            ),
            text=TextRef(name=text, tokens_sha256=text),
            settings={"chunk": 64},
            harness="h",
            machine_class="k",
        ),
        status="measured",
        metrics={
            "kld_mean": Estimate(value=float(np.mean(kld)), unit="nats/token"),
            "bits_per_value": Estimate(value=bits, unit="bits"),
        },
        samples={"kld_mean": list(kld)},
        engagement=[],
        provenance=SOMEWHERE,
    )


OURS = np.array([1.0, 2.0, 3.0, 4.0])
RECORDS = [
    arm("ratequant", 2.0, 1.99, OURS),
    arm("ratequant", 2.0, 1.99, np.add(OURS, [0.3, 0.4, 0.5, 0.6]), shuffle=1),
    arm("ratequant", 2.0, 1.99, np.add(OURS, [0.5, 0.4, 0.3, 0.2]), shuffle=2),
    arm("uniform", 4.0, 4.25, OURS / 10),
    arm("uniform", 2.0, 2.25, np.subtract(OURS, [0.1, 0.2, 0.1, 0.2])),
    arm("uniform", 1.0, 1.25, OURS * 3),
    arm("other", 1.6, 2.0, np.add(OURS, [1, -1, 1, -1])),
    arm("other", 2.0, 2.0, OURS * 9, text="another"),
]


def test_each_rival_gets_the_verdict_of_its_paired_interval():
    """Rivals worse on every pair are beaten, better ones are not; signs that alternate leave it undecided."""
    found = {c.rival: c for c in comparisons([r for r in RECORDS if r.subject.text.name == "t"])}
    verdicts = {name: c.verdict for name, c in found.items()}
    assert verdicts == {
        "mean of 2 shuffles (2 of them worse)": "better than",
        "other@1.6": "undecided against",
        "uniform@2": "worse than",  # the next dearer width, not 4.25 bits and not the cheaper 1.25
    }
    shuffles = found["mean of 2 shuffles (2 of them worse)"].worse_by
    assert (shuffles.value, shuffles.low, shuffles.high) == pytest.approx((0.4, 0.4, 0.4))
    # -0.15 with a standard error of 0.1/2/sqrt(3): Student t of 3 degrees of freedom is 3.182
    uniform = found["uniform@2"].worse_by
    assert (uniform.value, uniform.low, uniform.high) == pytest.approx(
        (-0.15, -0.15 - 0.09187, -0.15 + 0.09187), abs=1e-4
    )


def test_shuffles_are_controls_and_no_rows():
    """The page names them in the comparison and in one line of the list of records; no table of methods lists them."""
    page = "".join(pages(RECORDS, drawn=False)[1].values())
    assert len(table_rows(RECORDS)) == len(RECORDS) - 2
    assert "ratequant@2 is better than mean of 2 shuffles (2 of them worse); worse than uniform@2" in page
    lines = [line for line in page.splitlines() if "shuffle=" in line]
    assert len(lines) == 1
    assert "and 1 more" in lines[0]


def test_machines_are_not_paired_with_each_other():
    """Two machines with the same rows give each comparison twice, each from its own machine's figures."""
    elsewhere = SOMEWHERE.model_copy(update={"hardware": {**SOMEWHERE.hardware, "chip": "Apple M9"}})
    here = [record for record in RECORDS if record.subject.text.name == "t"]
    there = [record.model_copy(update={"provenance": elsewhere}) for record in here]
    both = list(comparisons([*here, *there]))
    assert sorted(c.rival for c in both) == sorted(2 * [c.rival for c in comparisons(here)])
    assert {c.rival: c.record.provenance.hardware["chip"] for c in both[:3]}.keys() == {c.rival for c in both[3:]}
    assert len({c.record.provenance.hardware["chip"] for c in both[3:]}) == 1
