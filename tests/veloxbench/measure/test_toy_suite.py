"""A suite is three things: a row, a class, a table. One that somebody else's package brings is planned, measured,
reported and gated, and nothing of the project is edited for it. The three are those of CONTRIBUTING.md.
"""

import json
import os
import subprocess
import sys

import pytest
from contributing_steps import contributing_files
from small_grids import COMMITTED

from veloxbench.inputs.models import resolve_model

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
    parts = contributing_files("Add a suite")
    for name in ("row", "suite", "table"):
        (package / f"{name}.py").write_text(parts[f"toybench/{name}.py"])
    (package / "__init__.py").touch()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toybench\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(parts["entry_points.txt"])
    (tmp_path / "toy.toml").write_text(GRID)
    return tmp_path


def veloxbench(folder, *arguments):
    path = os.pathsep.join(filter(None, [str(folder / "site"), *sys.path]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", f"{COMMITTED}from veloxbench.cli import main; main()", *arguments]
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
    suite.write_text(suite.read_text().replace("shift = np.array(", "shift = 1.5 * np.array("))
    done = veloxbench(toybench, *gate)
    assert (done.returncode, "of other code" in done.stderr) == (4, True)
    assert veloxbench(toybench, *run).returncode == 0
    done = veloxbench(toybench, *gate)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "logit_shift" in done.stderr
