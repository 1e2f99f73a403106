"""The gate judges this code, and nothing else: the hashes of the code in a record's key, the checkouts around it."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest
from gate_records import run_records

import veloxbench
from veloxbench.records import provenance
from veloxbench.records.provenance import code_hash, harness_hash
from veloxbench.run.plan import other_checkout


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


@pytest.mark.parametrize(
    ("file", "content", "moves"),
    [
        ("cache.py", b"def build(): return 2", True),
        ("cache.py", b"# why\ndef build(): return 1", False),
        ("kernel.so", b"\x7fELF 2", True),
        ("tables/centroids.json", b"[2]", True),
        ("more.py", b"", True),
        ("__pycache__/cache.cpython-311.pyc", b"2", False),
    ],
)
def test_whatever_a_strangers_package_runs_is_in_its_hash(file, content, moves, tmp_path, monkeypatch):
    """Sources, binaries and data count; comments in Python and what Python compiles do not."""
    package = tmp_path / f"lent{abs(hash((file, content)))}"
    for name, first in {
        "cache.py": b"def build(): return 1",
        "kernel.so": b"\x7fELF 1",
        "tables/centroids.json": b"[1]",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(first)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    build = importlib.import_module(f"{package.name}.cache").build
    before = code_hash.__wrapped__(build)
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_bytes(content)
    assert (code_hash.__wrapped__(build) != before) == moves


def test_records_of_another_state_of_the_checkout_are_known(tmp_path, monkeypatch):
    """Another commit of the same code is the same; a changed file and other code are said. Baselines are no code."""

    def git(*arguments):
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)
        for state in (provenance.project_state, provenance.changed_since):
            state.cache_clear()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache.py").write_text("first")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit, dirty = provenance.project_state(Path.cwd())
    assert dirty is False
    made = run_records()[0].provenance.model_copy(update={"project_commit": commit, "project_dirty": dirty})
    assert other_checkout(made) is None
    (tmp_path / "baselines" / "x").mkdir(parents=True)
    (tmp_path / "baselines" / "x" / "gate.json").write_text("{}")
    git("add", ".")
    git("commit", "-qm", "approved")
    assert other_checkout(made) is None
    (tmp_path / "cache.py").write_text("second")
    git("status")
    assert "with changes here" in str(other_checkout(made))
    git("commit", "-qam", "second")
    assert f"was commit {commit[:12]}" in str(other_checkout(made))
