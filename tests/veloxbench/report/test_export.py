"""Reports for other programs: the records' own figures, whatever the form, and forms that do not exist are refused."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from veloxbench.cli.app import _run
from veloxbench.records.store import read_records
from veloxbench.report.export import FORMATS, as_csv, as_junit, as_latex, as_parquet, flat_rows

ROOT = Path(__file__).parents[3]
FILES = [ROOT / "records" / "smollm2-135m.jsonl", ROOT / "records" / "gemma3-270m.jsonl"]


@pytest.fixture(scope="module")
def records():
    """Committed records of two models: quality, memory, speed, kernels."""
    return [record for file in FILES for record in read_records(file)]


def test_every_metric_is_one_row(records):
    """As many rows as the records have metrics, each with its own value and interval."""
    rows = list(flat_rows(records))
    assert len(rows) == sum(max(1, len(record.metrics)) for record in records)
    by_place = {(row["record"], row["metric"]): row for row in rows}
    for record in records:
        for name, estimate in record.metrics.items():
            row = by_place[record.id, name]
            assert (row["value"], row["low"], row["high"]) == (estimate.value, estimate.low, estimate.high)
            assert row["arm"] == record.subject.method.label
    assert {tuple(row) for row in rows} == {tuple(rows[0])}


def test_csv_and_parquet_say_the_same(records):
    """The value of each row read back from both is the record's, to the last bit."""
    rows = list(flat_rows(records))
    from_csv = list(csv.DictReader(io.StringIO(as_csv(records).decode())))
    from_parquet = pq.read_table(io.BytesIO(as_parquet(records))).to_pylist()
    assert len(from_csv) == len(from_parquet) == len(rows)
    for row, text, typed in zip(rows, from_csv, from_parquet, strict=True):
        assert float(text["value"]) == typed["value"] == row["value"]
        assert text["arm"] == typed["arm"] == row["arm"]
        assert json.loads(typed["settings"]) == json.loads(row["settings"])


def test_parquet_loads_with_datasets(records, tmp_path):
    """As `report --help` says, and with the same columns for two files of different suites."""
    from datasets import load_dataset

    parts = [[r for r in records if (r.subject.suite == "memory") is memory] for memory in (True, False)]
    files = [tmp_path / f"{n}.parquet" for n in range(2)]
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(as_parquet(part))
    loaded = load_dataset("parquet", data_files=[str(f) for f in files], split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded.num_rows == len(list(flat_rows(records)))
    klds = loaded.filter(lambda row: row["metric"] == "kld_mean" and row["model"] == "smollm2-135m")
    assert min(klds["value"]) == min(
        r.metrics["kld_mean"].value
        for r in records
        if "kld_mean" in r.metrics and r.subject.model.name == "smollm2-135m"
    )


def test_latex_escapes_what_latex_reads(records):
    """An underscore of a method's name is escaped, the sign of an interval is mathematics, and rules are booktabs'."""
    text = as_latex(records).decode()
    assert "turboquant\\_mse@4" in text
    assert "$\\pm$" in text
    assert "±" not in text
    assert text.count("\\begin{tabular}") == text.count("\\bottomrule") >= 4


def test_junit_has_a_case_for_each_record(records):
    """CI systems read it as XML: as many cases as records, none failed, the values as properties."""
    suite = ET.fromstring(as_junit(records))
    assert int(suite.get("tests")) == len(suite.findall("testcase")) == len(records)
    value = suite.find("testcase/properties/property[@name='kld_mean']").get("value")
    assert float(value) in [r.metrics["kld_mean"].value for r in records if "kld_mean" in r.metrics]


def test_no_records_make_a_report_of_every_form():
    """An empty table, an empty list: valid in each form."""
    for name, write in FORMATS.items():
        assert isinstance(write([], [], 0), bytes), name
    assert json.loads(FORMATS["json"]([], [], 0)) == {"records": [], "failures": []}


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.parquet", "x.tex", "x.xml", "x.html", "x.md"])
def test_the_suffix_of_out_is_the_form(name, tmp_path, records):
    """``--out x.csv`` writes CSV, and no Markdown; ``--check`` then agrees, and is stale after an edit."""
    out = tmp_path / name
    files = [str(file) for file in FILES]
    assert _run(["report", *files, "--out", str(out)]) == 0
    starts = {"csv": b"record,", "json": b"{", "parquet": b"PAR1", "tex": b"%", "xml": b"<?xml", "md": b"# "}
    assert out.read_bytes().lower().startswith(starts.get(out.suffix[1:], b"<!doctype html").lower())
    assert _run(["report", *files, "--check", str(out)]) == 0
    out.write_bytes(out.read_bytes() + b" ")
    assert _run(["report", *files, "--check", str(out)]) == 1


def test_the_option_overrules_the_suffix(tmp_path):
    """``--format`` says the form whatever the file is called."""
    out = tmp_path / "figures.txt"
    assert _run(["report", str(FILES[1]), "--out", str(out), "--format", "csv"]) == 0
    assert out.read_text().startswith("record,key,model,")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--out", "x.docx"], "unknown suffix of a report '.docx'"),
        (["--format", "cvs"], "unknown --format 'cvs'; did you mean csv"),
        (["--format", "parquet"], "--out FILE.parquet"),
    ],
)
def test_an_unknown_form_is_refused(options, named, tmp_path, monkeypatch, capsys):
    """In one sentence, with exit code 4, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert _run(["report", str(FILES[1]), *options]) == 4
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_csv_goes_to_standard_output():
    """Through a pipe, as other programs read it."""
    command = [sys.executable, "-m", "veloxbench.cli", "report", str(FILES[1]), "--format", "csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    assert len(list(csv.DictReader(io.StringIO(done.stdout)))) > 50
