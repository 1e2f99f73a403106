"""Every door ends in a sentence: hostile names, empty lists, odd options, wrong grids, broken plugins, Ctrl-C."""

import importlib
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from gate_records import run_records

from veloxbench.cli.app import _run as veloxbench
from veloxbench.cli.app import blamed
from veloxbench.errors import ExitCode, UsageError
from veloxbench.gate.verdicts import Finding, Verdict
from veloxbench.records.record import Record
from veloxbench.report.github import annotation_lines, summary
from veloxbench.report.html import render_html
from veloxbench.report.junit import junit
from veloxbench.report.page import render
from veloxbench.run.grid import load_grid

# ---- hostile names -------------------------------------------------------------------------------

NAMES = {
    "a pipe": "left|right",
    "newlines": "x\n## Forged\n\n| a |\n|---|\n| 1 |",
    "ANSI": "\x1b[31mred\x1b]0;title\x07",
    "a remote image": "![x](http://evil.example/x.png)",
    "an HTML image": '<img src="http://evil.example/x.png">',
}


def named(name: str) -> list[Record]:
    """The records of a run, of a model of that name."""
    records = []
    for record in run_records():
        model = record.subject.model.model_copy(update={"name": name})
        kept = {field: getattr(record, field) for field in ("status", "metrics", "samples", "engagement", "provenance")}
        records.append(Record.create(subject=record.subject.model_copy(update={"model": model}), **kept))
    return records


def columns(page: str) -> list[int]:
    """How many cells each row of each Markdown table has."""
    return [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in page.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("kind", NAMES)
def test_a_hostile_name_is_text_on_the_markdown_page(kind):
    """The page has the headings and the cells that it has with a plain name, and no image or control character."""
    plain, page = render(named("plain")), render(named(NAMES[kind]))
    assert columns(page) == columns(plain)
    assert "\n## Forged" not in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    assert not re.search(r"(?<!\\)!\[x\]\(|<img", page)


@pytest.mark.parametrize("kind", NAMES)
def test_a_hostile_name_is_text_on_the_html_page(kind):
    """Nothing is fetched, and no heading is forged."""
    page = render_html(named(NAMES[kind]))
    assert not re.search(r"<img[^>]*evil|src=.http", page)
    assert not re.search(r"<h2[^>]*>\s*Forged", page)
    assert "\x1b" not in page


@pytest.mark.parametrize("kind", NAMES)
def test_a_hostile_name_is_text_in_junit_and_on_github(kind):
    """XML that a parser takes, one line an annotation, one row a finding."""
    name = NAMES[kind]
    findings = [Finding("quality", name, name, Verdict.REGRESS, name)]
    (case,) = ET.fromstring(junit(findings)).iter("testcase")
    assert "\x1b" not in case.attrib["name"]
    assert all(line.startswith("::error") and "\n" not in line for line in annotation_lines(findings))
    plain = summary([Finding("quality", "plain", "plain", Verdict.REGRESS, "plain")], "gate")
    assert columns(summary(findings, "gate")) == columns(plain)
    assert not re.search(r"(?<!\\)!\[x\]\(|<img", summary(findings, "gate"))


# ---- what is refused before anything starts -------------------------------------------------------

GRID = 'summary = "s"\nmodels = ["smollm2-135m"]\nsuites = ["perplexity"]\narms = ["turboquant_mse@4"]\n'
REFUSED = {
    "no suites": ("run", "--suites", ","),
    "no models": ("run", "--models", ","),
    "a memory budget of nan": ("run", "--memory-budget", "nan"),
    "a negative memory budget": ("run", "--memory-budget", "-1"),
    "a target of nan": ("run", "--targets", "nan"),
    "a negative target": ("run", "--targets", "-4"),
    "negative minutes": ("compare", "HEAD", "HEAD", "--minutes", "-1"),
    "minutes of nan": ("compare", "HEAD", "HEAD", "--minutes", "nan"),
    "hours of nan": ("trial", "timing", "record", "--out", "x.jsonl", "--hours", "nan"),
    "a speed of nan": ("recommend", "--model", "smollm2-135m", "--speed", "nan"),
    "a negative loss": ("recommend", "--model", "smollm2-135m", "--max-kld", "-1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_odd_options_are_refused_before_anything_starts(kind, tmp_path, monkeypatch, capsys):
    """One sentence that names the option or its value, exit 4, and no file is made."""
    monkeypatch.chdir(tmp_path)
    assert veloxbench(list(REFUSED[kind])) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "defect" not in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('suites = ["perplexity"]', "suites = []", "suites"),
        ('models = ["smollm2-135m"]', "models = []", "models"),
        ('models = ["smollm2-135m"]', 'models = [""]', "models"),
    ],
)
def test_a_grid_of_nothing_is_refused(before, after, named, tmp_path):
    """Empty ``suites`` or ``models`` measure nothing, which is no success."""
    (tmp_path / "mine.toml").write_text(GRID.replace(before, after))
    with pytest.raises(UsageError, match=named):
        load_grid(str(tmp_path / "mine.toml"))


def test_errors_of_a_grid_come_all_at_once(tmp_path):
    """Five errors in five places, one message."""
    grid = GRID.replace("smollm2-135m", "").replace('"perplexity"', '"perplexity", "perplexty"')
    grid = grid.replace("turboquant_mse@4", "turboquant_mes@4") + 'n_layers = 0\ncorpos = "x"\n'
    (tmp_path / "mine.toml").write_text(grid)
    with pytest.raises(UsageError) as caught:
        load_grid(str(tmp_path / "mine.toml"))
    for named in ("models", "perplexty", "turboquant_mes", "n_layers", "corpos"):
        assert named in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- whose defect it is --------------------------------------------------------------------------


def test_a_plugins_error_is_the_plugins(tmp_path, monkeypatch):
    """What a distribution's method raises is a defect of that distribution, by name and version."""
    info = tmp_path / "lender-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lender\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[veloxbench.methods]\nlent = lent_cache\n")
    (tmp_path / "lent_cache.py").write_text("def build():\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError) as caught:
        importlib.import_module("lent_cache").build()
    said = blamed(caught.value)
    assert "a defect of lender 2.5" in said
    assert str(tmp_path / "lent_cache.py") in said


def test_a_file_systems_error_is_the_files():
    """An error of the operating system names its file and is nobody's defect."""
    with pytest.raises(NotADirectoryError) as caught:
        Path("/proc/self/mem/x").read_bytes()
    assert "defect" not in blamed(caught.value)
    assert "/proc/self/mem/x" in blamed(caught.value)


# ---- Ctrl-C --------------------------------------------------------------------------------------

LONG = {
    "run": (("run", "--profile", "smoke"), "veloxbench.run.grid.load_grid"),
    "models --download": (("models", "--download", "smollm2-135m"), "veloxbench.inputs.models.resolve_model"),
    "gate": (("gate",), "veloxbench.gate.baselines.read_baselines"),
    "report": (("report", "."), "veloxbench.records.selection.read_folders"),
    "recommend --measure": (("recommend", "--model", "smollm2-135m", "--measure"), "veloxbench.run.grid.load_grid"),
    "trial damages": (("trial", "damages"), "veloxbench.run.grid.load_grid"),
    "trial timing record": (
        ("trial", "timing", "record", "--out", "x.jsonl"),
        "veloxbench.trials.timing_record.record",
    ),
}


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", LONG)
def test_ctrl_c_says_how_to_go_on(kind, tmp_path, monkeypatch, capsys):
    """Every long command ends with 130 and the one sentence that says what to type."""
    arguments, place = LONG[kind]
    module, _, name = place.rpartition(".")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module(module), name, interrupt)
    assert veloxbench(list(arguments)) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "veloxbench: stopped; type the same command again to go on"


def test_ctrl_c_in_a_calibration_says_how_to_go_on(monkeypatch, capsys):
    """The calibration's own command, too: 130, and what is kept."""
    command = importlib.import_module("veloxquant_mlx.calibration.__main__")
    monkeypatch.setattr(command.mlx_lm, "load", interrupt)
    monkeypatch.setattr(sys, "argv", ["calibration", "a-model", "--out", "x.safetensors"])
    monkeypatch.setattr(command.CONSOLE, "file", sys.stderr)
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == ExitCode.INTERRUPTED
    assert "type the same command again" in " ".join(capsys.readouterr().err.split())
