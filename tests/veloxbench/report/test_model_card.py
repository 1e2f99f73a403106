"""The badge of a model card and the block for a pull request, from committed records."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from veloxbench.cli.app import _run
from veloxbench.records.store import read_records
from veloxbench.report.model_card import badges, perplexity_blocks
from veloxbench.report.page import render

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def records():
    return [r for name in ("smollm2-135m", "gemma3-270m") for r in read_records(ROOT / "records" / f"{name}.jsonl")]


def decoded(records, model, label):
    """The record of the decode protocol."""
    (record,) = (
        r
        for r in records
        if (r.subject.model.name, r.subject.method.label, r.subject.protocol) == (model, label, "decode")
    )
    return record


def test_a_badge_is_one_line_for_each_model(records):
    """Word, KLD and bits of the decode record, whose id is there; gemma3 loses ten times what is noticeable."""
    lines = badges(records, "turboquant_mse@4").splitlines()
    assert [re.search(r"of (\S+): (\w+),", line).groups() for line in lines] == [
        ("gemma3-270m", "bad"),
        ("smollm2-135m", "noticeable"),
    ]
    record = decoded(records, "smollm2-135m", "turboquant_mse@4")
    assert f"record {record.id[:12]}" in lines[1]
    assert f"KLD {record.metrics['kld_mean'].value:.4f} ±" in lines[1]


def test_a_shield_reads_as_its_text(records):
    """Dashes and underscores doubled, as shields.io asks: three parts remain."""
    line = badges(records, "turboquant_mse@4").splitlines()[1]
    parts = unquote(re.search(r"badge/(.+)\)$", line)[1]).split("-")
    said = [part.replace("__", "\0").replace("_", " ").replace("\0", "_") for part in parts]
    assert said == ["KV cache", "turboquant_mse@4 noticeable", "yellow"]


def test_an_arm_without_quality_has_no_badge(capsys):
    """Exit code 4 with near matches: neither a typing error nor fp16 gets a word."""
    source = str(ROOT / "records" / "gemma3-270m.jsonl")
    assert _run(["report", source, "--badge", "turboquant_mse@5"]) == 4
    assert "unknown arm 'turboquant_mse@5'; did you mean turboquant_mse@" in capsys.readouterr().err
    assert _run(["report", source, "--badge", "fp16"]) == 4


def test_the_block_has_llama_perplexitys_names_and_the_records_figures(records):
    """Each line is a name of ``llama-perplexity --kl-divergence`` with the metric; ± is half the interval."""
    record = decoded(records, "smollm2-135m", "turboquant_mse@4")
    block = next(b for b in perplexity_blocks(records).split("record ") if b.startswith(record.id))
    kld = record.metrics["kld_mean"]
    value, half = map(float, re.search(r"^Mean    KLD +: +(\S+) ± +(\S+)$", block, re.M).groups())
    assert (value, half) == pytest.approx((kld.value, (kld.high - kld.low) / 2), abs=1e-6)
    assert float(re.search(r"^Same top p +: +(\S+) ", block, re.M)[1]) == pytest.approx(
        100 * record.metrics["top1_agreement"].value, abs=1e-6
    )
    base = decoded(records, "smollm2-135m", "fp16")
    assert float(re.search(r"^Mean PPL\(base\) +: +(\S+)", block, re.M)[1]) == pytest.approx(
        base.metrics["ppl"].value, abs=1e-6
    )


def test_every_quality_table_has_the_word(records):
    """A heading in each table with a KLD but those of what is recalled, and a word or nothing (fp16) in each row."""
    page = render(records)
    tables = [t.splitlines() for t in page.split("\n\n") if t.startswith("|") and "KLD" in t.splitlines()[0]]
    tables = [table for table in tables if "recalled" not in table[0]]  # a verdict needs the 99% of a text's positions
    assert len(tables) >= 4
    for header, _, *rows in tables:
        place = [cell.strip() for cell in header.split("|")].index("verdict")
        assert {row.split("|")[place].strip() for row in rows} <= {"lossless", "good", "noticeable", "bad", ""}


def test_a_block_names_the_reference_of_its_own_machine(records):
    """A contributed fp16 row with another perplexity changes no block of this machine's arms."""
    base = decoded(records, "smollm2-135m", "fp16")
    hardware = {**base.provenance.hardware, "chip": "Apple M9"}
    ppl = base.metrics["ppl"].model_copy(update={"value": 99.0})
    there = base.model_copy(
        update={
            "provenance": base.provenance.model_copy(update={"hardware": hardware}),
            "metrics": {**base.metrics, "ppl": ppl},
        }
    )
    blocks = [set(perplexity_blocks(some).split("\n\n")) for some in ([there, *records], records)]
    assert blocks[0] == blocks[1]
