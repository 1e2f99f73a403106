"""Reports for other programs: the records' own figures, whatever the form, and forms that do not exist are refused."""

from __future__ import annotations

import csv
import functools
import io
import json
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from veloxbench.cli.app import _run
from veloxbench.records.store import read_records
from veloxbench.report import hub
from veloxbench.report.export import FORMATS, as_csv, as_junit, as_latex, as_parquet, flat_rows
from veloxbench.report.page import drawings

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
        value = float(text["value"]) if text["value"] else None  # an arm that is not supported has a reason
        assert value == typed["value"] == row["value"]
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


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.parquet", "x.tex", "x.xml", "x.html", "x.md", "x.svg", "x.png"])
def test_the_suffix_of_out_is_the_form(name, tmp_path):
    """``--out x.csv`` writes CSV, and no Markdown; ``--check`` then agrees, and is stale after an edit."""
    out = tmp_path / name
    files = [str(FILES[1])]
    assert _run(["report", *files, "--out", str(out)]) == 0
    starts = {
        "csv": b"record,",
        "json": b"{",
        "parquet": b"PAR1",
        "tex": b"%",
        "xml": b"<?xml",
        "md": b"# ",
        "svg": b"<svg",
        "png": b"\x89png",
    }
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
        (["--format", "png"], "--out FILE.png"),
        (["--details", "x"], "name the page with --out"),
        (["--push", "nobody"], "write USER/NAME"),
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


def test_a_chart_is_the_same_bytes_every_time(records):
    """Drawn from the same records in another order: an SVG for a light page, another for a dark one, and no others."""
    of_gemma = [record for record in records if record.subject.model.name == "gemma3-270m"]
    first = drawings(of_gemma)
    assert first == drawings(of_gemma[::-1])
    assert set(first) == {"gemma3-270m-light.svg", "gemma3-270m-dark.svg"}
    assert len(set(first.values())) == 2
    assert all(ET.fromstring(text).tag.endswith("svg") for text in first.values())


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs; keeps what it was sent."""

    sent: ClassVar[dict[str, bytes]] = {}

    def do_POST(self):
        self.sent[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {
            "url": f"http://{self.headers['Host']}/datasets/me/kv",
            "commitUrl": f"http://{self.headers['Host']}/datasets/me/kv/commit/0",
            "commitOid": "0" * 40,
        }
        if "preupload" in self.path:
            asked = json.loads(self.sent[self.path])["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


def test_push_uploads_the_rows_and_a_card(monkeypatch, capsys, tmp_path):
    """One commit to the data set that was named: the Parquet of the records, and a card that says how it loads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "HfApi", functools.partial(HfApi, endpoint=address, token="hf_" + "x" * 34))
    try:
        assert _run(["report", str(FILES[1]), "--push", "me/kv"]) == 0
    finally:
        server.shutdown()
    assert "/datasets/me/kv/commit/0" in capsys.readouterr().err
    lines = [json.loads(line) for line in Hub.sent["/api/datasets/me/kv/commit/main"].splitlines()]
    files = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    assert pq.read_table(io.BytesIO(files["data/records.parquet"])).num_rows > 50
    assert b'load_dataset("me/kv"' in files["README.md"]


def test_a_hub_that_is_not_there_is_said(monkeypatch, capsys):
    """Exit code 5 and one sentence with what gives access."""
    monkeypatch.setattr(hub, "HfApi", functools.partial(HfApi, endpoint="http://127.0.0.1:9", token="hf_" + "x" * 34))
    assert _run(["report", str(FILES[1]), "--push", "me/kv"]) == 5
    assert "me/kv was not uploaded" in capsys.readouterr().err
