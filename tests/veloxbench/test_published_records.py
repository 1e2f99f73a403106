"""Published records measured again, and records that somebody contributes."""

import json
from pathlib import Path

import pytest
from gate_records import HARDWARE, damage, quality_record, run_records

from veloxbench.cli.app import _run as veloxbench
from veloxbench.compare.submission import layout, problems
from veloxbench.compare.verify import chosen_records, compared, inconsistent
from veloxbench.errors import UsageError
from veloxbench.gate.verdicts import Verdict, overall
from veloxbench.records.record import Estimate, LayerEngagement, Record, content_hash
from veloxbench.records.store import read_records

ROOT = Path(__file__).parents[2]
KERNELS = [
    record.id[:10]
    for record in read_records(ROOT / "records" / "smollm2-135m.jsonl")
    if record.subject.suite == "kernels"
]


def remade(record, **changes):
    """A record with other content and hashes that are right: what somebody would publish."""
    fields = {name: getattr(record, name) for name in Record.model_fields if name not in ("id", "key")}
    return Record.create(**{**fields, **changes})


def test_committed_kernel_records_hold_here(capsys):
    """Traffic that was counted on another day is counted again, byte for byte."""
    assert veloxbench(["verify", *KERNELS[:2]]) == 0
    assert "2 of 2 records hold here" in capsys.readouterr().out


def test_a_tampered_record_does_not_hold(tmp_path, capsys):
    """One count lowered by a percent, hashes made anew: measured again it is another, and the exit code says so."""
    (record,) = chosen_records(KERNELS[:1], [])
    reads = record.metrics["packed_bytes"]
    lower = reads.model_copy(update={"value": reads.value * 0.99})
    file = tmp_path / "theirs.jsonl"
    file.write_text(remade(record, metrics={**record.metrics, "packed_bytes": lower}).to_line())
    assert veloxbench(["verify", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT HOLD" in printed
    assert "packed_bytes" in printed


def test_a_line_edited_by_hand_is_not_even_measured(tmp_path):
    """Its id is not the hash of its content."""
    (record,) = chosen_records(KERNELS[:1], [])
    fields = json.loads(record.to_line())
    fields["metrics"]["packed_bytes"]["value"] *= 0.99
    file = tmp_path / "edited.jsonl"
    file.write_text(json.dumps(fields) + "\n")
    assert veloxbench(["verify", str(file)]) == 5


@pytest.mark.parametrize(
    ("change", "verdict"),
    [(0.0, Verdict.PASS), (0.002, Verdict.PASS), (0.03, Verdict.REGRESS), (-0.03, Verdict.INCONCLUSIVE)],
)
def test_quality_holds_within_the_gates_margin(change, verdict):
    """A record of another chip, rounding and MLX is judged as the gate judges: a tenth of .058 nats either way."""
    theirs = quality_record(
        kld=damage(0.058), hardware={**HARDWARE, "chip": "Apple M2", "machine": "arm64", "rounding": "other"}
    )
    here = quality_record(kld=damage(0.058) + change)
    assert overall(compared(theirs, here)) is verdict


def test_a_metric_that_is_not_the_mean_of_its_samples_is_named():
    """Somebody lowered the figure of the table and left the samples."""
    record = quality_record()
    better = {**record.metrics, "kld_mean": Estimate(value=0.001, unit="nats/token")}
    assert [finding.metric for finding in inconsistent(remade(record, metrics=better))] == ["kld_mean"]
    assert not inconsistent(record)


def test_a_timing_cannot_be_verified(tmp_path):
    """It is one machine's at one moment."""
    records = read_records(ROOT / "records" / "smollm2-135m.jsonl")
    timing = next(record for record in records if record.subject.suite == "throughput")
    file = tmp_path / "timing.jsonl"
    file.write_text(timing.to_line())
    assert veloxbench(["verify", str(file)]) == 4


def test_an_id_must_name_one_record():
    """Too short a beginning, or one of nothing, is refused."""
    for name in ("0", "ffffffffffff"):
        with pytest.raises(UsageError, match="name one"):
            chosen_records([name], [])


def with_layers(record):
    layer = {
        "layer": 0,
        "cache_class": "C",
        "claimed": True,
        "engaged": True,
        "stored_dtypes": [],
        "tokens": 1,
        "n_values": 1,
        "used_bytes": 1,
        "allocated_bytes": 1,
    }
    floor = {"kld_floor_mean": Estimate(value=1e-7, unit="nats/token")} if record.subject.method.name == "fp16" else {}
    return remade(record, engagement=[LayerEngagement(**layer)], metrics={**record.metrics, **floor})


def test_records_that_may_be_published_become_one_file_a_machine(tmp_path):
    """A whole run of this code passes; its files hold the same records."""
    records = list(map(with_layers, run_records()))
    assert problems(records) == []
    ((path, text),) = layout(records).items()
    assert path.parent.as_posix() == "records/contributed"
    assert path.name == f"amd-epyc-{content_hash(HARDWARE)[:8]}.jsonl"
    file = tmp_path / "copy.jsonl"
    file.write_text(text)
    assert {record.id for record in read_records(file)} == {record.id for record in records}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda rs: rs[1:], "no fp16 reference"),
        (lambda rs: [*rs[:-1], quality_record()], "does not say what held"),
        (lambda rs: [*rs, with_layers(quality_record("turboquant_mse", 3.0, dirty=True))], "uncommitted changes"),
        (lambda rs: [*rs, with_layers(quality_record("turboquant_mse", 3.0, harness="f" * 64))], "is not this"),
        (lambda rs: [], "no measured record"),
    ],
)
def test_records_that_may_not_be_published_are_named(broken, said):
    """Each check has its sentence."""
    found = problems(broken(list(map(with_layers, run_records()))))
    assert any(said in problem for problem in found), found


def test_submit_lays_a_pull_request_out(tmp_path):
    """The records' file and the request's text with a table of the hardware; damaged input writes nothing."""
    folder, out = tmp_path / "records.jsonl", tmp_path / "out"
    folder.write_text("".join(with_layers(record).to_line() for record in run_records()))
    assert veloxbench(["submit", str(folder), "--out", str(out)]) == 0
    assert "| AMD EPYC |" in (out / "PULL_REQUEST.md").read_text()
    assert len(list((out / "records" / "contributed").glob("*.jsonl"))) == 1
    folder.write_text(run_records()[1].to_line())
    assert veloxbench(["submit", str(folder), "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
