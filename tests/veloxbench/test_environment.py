"""The hashes of the code that stand in a record's key."""

import shutil
from pathlib import Path

import pytest

import veloxbench
from veloxbench.records.provenance import harness_hash


@pytest.mark.parametrize(
    ("file", "moves"),
    [
        ("measure/memory.py", True),
        ("methods/mlx_affine.py", True),
        ("inputs/models.py", True),
        ("records/intervals.py", True),
        ("run/session.py", True),
        ("cli/app.py", False),
        ("report/page.py", False),
    ],
)
def test_a_change_that_can_move_a_number_is_in_the_key(file, moves, tmp_path, monkeypatch):
    """What measures, loads or builds is hashed, so that a run measures again; front doors and reports are not."""
    package = tmp_path / "veloxbench"
    shutil.copytree(Path(veloxbench.__file__).parent, package, ignore=shutil.ignore_patterns("data", "__pycache__"))
    monkeypatch.setattr(veloxbench, "__file__", str(package / "__init__.py"))
    before = harness_hash.__wrapped__()
    with (package / file).open("a") as source:
        source.write("\nCHANGED = True\n")
    assert (harness_hash.__wrapped__() != before) == moves
