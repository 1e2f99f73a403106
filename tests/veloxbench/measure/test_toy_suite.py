"""A suite is three things: a row, a class, a table. One that somebody else's package brings is planned, measured,
reported and gated, and nothing of the project is edited for it.
"""

import json
import os
import subprocess
import sys

import pytest

from veloxbench.inputs.models import resolve_model

ROW = """
from veloxbench.records.suites import Budget, SuiteRow

ROW = SuiteRow(
    "toy",
    "how far the logits of the last token move",
    moved_by="rounding",
    exact=("tokens_read",),
    per_sequence={"logit_shift": Budget(1e-3, 0.1, 0.1, "a tenth of what the toy method moves")},
)
"""
CLASS = """
import mlx.core as mx
import numpy as np
from pydantic import BaseModel

from veloxbench.measure.suite import Cell, Measured, Suite, measures
from veloxbench.records.arm import REFERENCE
from veloxbench.records.intervals import mean_interval
from veloxbench.records.record import Estimate


class ToyTask(BaseModel):
    sequences: int
    length: int


@measures
class Toy(Suite):
    name = "toy"
    section = "toy"
    tasks = ToyTask

    def cells(self, tasks, arms):
        for arm in arms:
            yield Cell(self.name, "last token", tasks, arm, tasks.sequences, tasks.length, tasks.length)

    def seconds(self, cell, rates):
        return cell.sequences * cell.length * rates.token_seconds

    def measure(self, item, bench, tick):
        tokens = mx.array(item.block.tokens)
        logits = [bench.model(tokens, cache=bench.caches(arm).caches)[:, -1] for arm in (REFERENCE, item.cell.arm)]
        shift = np.array(mx.mean(mx.abs(logits[0] - logits[1]), axis=-1)).astype(float) * FACTOR
        read = Estimate(value=tokens.size, unit="tokens")
        metrics = {"logit_shift": mean_interval(shift, "logits"), "tokens_read": read}
        return Measured(metrics, {"logit_shift": shift.tolist()})


FACTOR = 1.0
"""
TABLE = """
from veloxbench.report.tables import register_table


@register_table("toy")
def toy(records):
    lines = [f"{r.subject.method.label}: {r.metrics['logit_shift'].value:.4f}" for r in records]
    return ["### Toy", *lines]
"""
ENTRY_POINTS = """
[veloxbench.suites]
toy = toybench.row:ROW
[veloxbench.measures]
toy = toybench.suite
[veloxbench.tables]
toy = toybench.table
"""
GRID = """
summary = "toy"
models = ["smollm2-135m"]
n_layers = 1
corpus = "bundled"
suites = ["toy"]
arms = ["turboquant_mse@2:sinks=4"]
[toy]
sequences = 16
length = 24
"""


@pytest.fixture
def toybench(tmp_path):
    """The package with its three parts, entered as an installed distribution enters its own."""
    resolve_model("smollm2-135m")
    package, installed = tmp_path / "site" / "toybench", tmp_path / "site" / "toybench-1.dist-info"
    package.mkdir(parents=True)
    installed.mkdir()
    for name, text in (("__init__", ""), ("row", ROW), ("suite", CLASS), ("table", TABLE)):
        (package / f"{name}.py").write_text(text)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toybench\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "toy.toml").write_text(GRID)
    return tmp_path


def veloxbench(folder, *arguments):
    path = os.pathsep.join(filter(None, [str(folder / "site"), *sys.path]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "veloxbench.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_suite_of_somebody_elses_is_planned_measured_reported_and_gated(toybench):
    """Row, class and table are enough, from the plan's line to the verdict; a worse figure fails its gate."""
    run = ("run", "--profile", "toy.toml", "--out", "out")
    done = veloxbench(toybench, *run)
    assert done.returncode == 0, done.stderr
    assert "2 measurements" in done.stderr
    assert "### Toy" in (toybench / "out" / "BENCHMARK_RESULTS.md").read_text()
    approve = (
        "baseline",
        "approve",
        "--profile",
        "toy.toml",
        "--records",
        "out",
        "--reason",
        "x",
        "--unknown-checkout",
    )
    assert (done := veloxbench(toybench, *approve)).returncode == 0, done.stderr
    gate = ("gate", "--profile", "toy.toml", "--records", "out", "--json")
    done = veloxbench(toybench, *gate)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = {(f["tier"], f["metric"]) for f in json.loads(done.stdout)["findings"]}
    assert ("quality", "logit_shift") in judged
    suite = toybench / "site" / "toybench" / "suite.py"
    suite.write_text(suite.read_text().replace("FACTOR = 1.0", "FACTOR = 1.5"))
    done = veloxbench(toybench, *gate)
    assert (done.returncode, "of other code" in done.stderr) == (4, True)
    assert veloxbench(toybench, *run).returncode == 0
    done = veloxbench(toybench, *gate)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "logit_shift" in done.stderr
