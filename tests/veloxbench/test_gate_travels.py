"""The gate judges this code, and nothing else: quality baselines travel. Approved with one thread, they serve every
order in which a processor adds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_grids import COMMITTED, quality_grid

from veloxbench.cli.app import _run as veloxbench
from veloxbench.records import provenance
from veloxbench.records.store import read_records

GRID = quality_grid(["turboquant_mse@4"], layers="n_layers = 2", length=16)
SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    "AVX2": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "AVX2"},
    "compatible": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"},
}
# a process of its own, whose BLAS reads the settings
PROGRAM = f"{COMMITTED}from veloxbench.cli.app import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def approved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile with the baseline of a run with one thread."""
    folder = tmp_path_factory.mktemp("travel")
    (folder / "mine.toml").write_text(GRID)
    assert run(folder, "one thread") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "git_state", lambda: ("c" * 40, False))
        assert veloxbench(["baseline", "approve", "--reason", "first", *places(folder, "one thread")]) == 0
    return folder


def run(folder: Path, setting: str) -> int:
    plain = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    words = ["run", "--profile", str(folder / "mine.toml"), "--out", str(folder / setting)]
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, env=plain | SETTINGS[setting], capture_output=True, check=False).returncode


def places(folder: Path, setting: str) -> list[str]:
    return [
        *("--records", str(folder / setting), "--baseline", str(folder / "baselines")),
        *("--profile", str(folder / "mine.toml")),
    ]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_baseline_of_one_thread_judges_every_setting(approved, setting, capsys):
    """Another rounding is another draw of noise: green or inconclusive, exact facts equal, nothing missing."""
    if setting != "one thread":
        assert run(approved, setting) == 0
    capsys.readouterr()
    code = veloxbench(["gate", "--json", *places(approved, setting)])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert code in (0, 2)
    assert {finding["verdict"] for finding in findings} <= {"pass", "inconclusive"}
    assert {finding["verdict"] for finding in findings if finding["tier"] == "exact"} == {"pass"}
    first, here = (read_records(approved / name)[0].provenance.hardware["rounding"] for name in ("one thread", setting))
    drawn_anew = any("another rounding" in finding["reason"] for finding in findings)
    assert drawn_anew == (first != here)
