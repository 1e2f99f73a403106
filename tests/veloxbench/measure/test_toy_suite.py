"""A suite is three things: a row, a class, a table. One that somebody else's package brings is planned, measured,
reported and gated, and nothing of the project is edited for it. The three are those of CONTRIBUTING.md.
"""

import json
import os
import subprocess
import sys

import pytest
from contributing_steps import contributing_files
from small_grids import LINES

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


RUN = "run --profile toy.toml --out out"
APPROVE = "baseline approve --profile toy.toml --records out --reason x --unknown-checkout"
GATE = "gate --profile toy.toml --records out"


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


def veloxbench(folder, *lines):
    path = os.pathsep.join(filter(None, [str(folder / "site"), *sys.path]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", LINES, *lines]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done


def test_a_suite_of_somebody_elses_is_planned_measured_reported_and_gated(toybench):
    """Row, class and table are enough, from the plan's line to the verdict; a worse figure fails its gate."""
    codes, done = veloxbench(toybench, RUN, APPROVE, f"{GATE} --json")
    assert codes == [0, 0, 0], done.stderr
    assert "2 measurements" in done.stderr
    assert "### Toy" in (toybench / "out" / "BENCHMARK_RESULTS.md").read_text()
    report = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert ("quality", "logit_shift") in {(f["tier"], f["metric"]) for f in report["findings"]}
    suite = toybench / "site" / "toybench" / "suite.py"
    suite.write_text(suite.read_text().replace("shift = np.array(", "shift = 1.5 * np.array("))
    codes, done = veloxbench(toybench, GATE, RUN, GATE)
    assert codes == [4, 0, 1], done.stderr
    assert "of other code" in done.stderr
    assert "logit_shift" in done.stderr
