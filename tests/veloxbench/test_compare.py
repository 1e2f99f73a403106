"""Two revisions of a repository, or two sets of records, judged one by the other."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from gate_records import damage, run_records
from small_grids import IN_MEMORY, TIMED, quality_grid

import veloxbench
from veloxbench.cli.app import _run
from veloxbench.compare.compare import Plan, compare_revisions
from veloxbench.compare.revisions import Revision, prepare, unmet_dependencies
from veloxbench.compare.side import Worker, WorkerError, WorkFailed
from veloxbench.compare.timed_decode import DecodeSpec
from veloxbench.compare.timing_test import TimingSpec
from veloxbench.errors import ExitCode
from veloxbench.gate.verdicts import Verdict, exit_code
from veloxbench.records.store import JOURNAL, LAST_RUN

ROOT = Path(__file__).parents[2]
CENTROIDS = "impl/veloxquant_mlx/quantizers/lloyd_max.py"


def git(repository, *arguments):
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(repository), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def edit(repository, tag, file, old, new):
    """A child of the first commit, tagged, in which one place of one file is another."""
    text = (repository / file).read_text()
    assert text.count(old) == 1
    (repository / file).write_text(text.replace(old, new))
    git(repository, "commit", "-qam", tag)
    git(repository, "tag", tag)
    git(repository, "reset", "-q", "--hard", "base")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of this repository's packages, and children of its one commit."""
    folder = tmp_path_factory.mktemp("repository")
    for part in ("impl", "kernels"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "base")
    git(folder, "tag", "base")
    edit(folder, "renamed", CENTROIDS, "middle, distortion)", "middle, float(distortion))")
    edit(folder, "damaged", CENTROIDS, "Codebook(centroids, middle,", "Codebook(1.1 * centroids, middle,")
    edit(
        folder,
        "crashing",
        CENTROIDS,
        "return Codebook(centroids,",
        "raise RuntimeError('broken on purpose')\n    return Codebook(centroids,",
    )
    edit(folder, "unbuildable", "pyproject.toml", '"numpy>=2.0"', '"numpy==0.0.1"')
    edit(folder, "pinned", "pyproject.toml", '"numpy>=2.0"', '"numpy>=2.0", "tinydep==2.0"')
    return folder


@pytest.fixture
def grid(cut_model, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(quality_grid(["turboquant_mse@4"], model=str(cut_model), tables=TIMED + IN_MEMORY))
    return path


@pytest.fixture(scope="module", autouse=True)
def own_cache(cut_model, tmp_path_factory):
    """Revisions and records of these tests stay out of the user's cache (the model was found before)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VELOXBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def compare(repository, grid, base, head, *more):
    return _run(["compare", base, head, "--repo", str(repository), "--profile", str(grid), *more])


@pytest.mark.slow
def test_a_revision_that_computes_the_same_passes(repository, grid, capsys):
    """Another commit, other source text, equal values: no sequence changed."""
    assert compare(repository, grid, "base", "renamed", "--tiers", "records") == ExitCode.PASS
    shown = capsys.readouterr()
    commits = [git(repository, "rev-parse", name)[:12] for name in ("base", "renamed")]
    assert all(commit in shown.err for commit in commits)
    assert "compare: pass" in shown.err


def test_a_revision_that_decodes_worse_regresses(repository, grid, capsys):
    """Centroids 10% too large: the quality tier names the arm and the metric."""
    assert compare(repository, grid, "base", "damaged", "--tiers", "records") == ExitCode.REGRESSION
    assert "turboquant_mse@4, kld_mean" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commit_that_made_it_worse_is_found(repository, grid, capsys):
    """Three commits on the base, of which the second damages, measured one beside the other: that one is named."""
    git(repository, "checkout", "-q", "-b", "line", "base")
    git(repository, "commit", "-q", "--allow-empty", "-m", "harmless")
    git(repository, "cherry-pick", "damaged")
    git(repository, "commit", "-q", "--allow-empty", "-m", "more")
    git(repository, "checkout", "-q", "--detach", "base")
    command = ["bisect", "base", "line", "--repo", str(repository), "--profile", str(grid)]
    assert _run([*command, "--subject", "turboquant_mse@4"]) == ExitCode.PASS
    shown = capsys.readouterr()
    assert shown.out.rstrip().endswith(": damaged")
    assert "that is the first bad commit" in shown.err
    assert _run(["bisect", "base", "renamed", *command[3:], "--subject", "turboquant_mse@4"]) == ExitCode.USAGE
    assert "renamed is not worse than the good revision" in capsys.readouterr().err


@pytest.mark.slow
def test_a_revision_that_crashes_is_one_sentence(repository, grid, capsys):
    """It names the side, the revision and what was raised."""
    assert compare(repository, grid, "base", "crashing", "--tiers", "records") == ExitCode.REGRESSION
    error = capsys.readouterr().err.splitlines()[-1]
    assert "head (crashing)" in error
    assert "on purpose" in error


def test_what_base_cannot_measure_has_nothing_to_compare_with(repository, grid, cut_model, capsys):
    """An arm that only head can build, measured and timed: exit 3, named; fp16 is judged all the same."""
    more = ("--tiers", "all", "--model", str(cut_model), "--minutes", "0.05")
    assert compare(repository, grid, "crashing", "base", *more) == ExitCode.BASELINE
    shown = capsys.readouterr()
    assert "base (crashing)" in shown.err.splitlines()[-1]
    assert "on purpose" in shown.err.splitlines()[-1]
    assert "no-baseline: " + str(cut_model) + " decode, decode of turboquant_mse@4: it crashed" in shown.out
    (fp16,) = [line for line in shown.out.splitlines() if "fp16" in line and " nll " in line]
    assert fp16.rstrip().endswith("pass")


@pytest.mark.parametrize(
    ("side", "code"),
    [("base", ExitCode.BASELINE), ("head", ExitCode.REGRESSION)],
)
def test_a_side_that_cannot_be_imported_is_a_finding(sides, side, code):
    """The first command raises there: nothing to compare with where base did, a regression of head."""
    found = sides(lambda name, do, arguments: (name, do) == (side, "hello"))
    assert [finding.subject for finding in found] == [f"revision {side}"]
    assert exit_code(found) == code


@pytest.mark.parametrize("broken", ["open_decode", "decode"])
@pytest.mark.parametrize(("side", "verdict"), [("base", Verdict.NO_BASELINE), ("head", Verdict.REGRESS)])
def test_a_crash_while_timing_keeps_what_was_found(sides, broken, side, verdict):
    """Metric a cannot be opened by head; b crashes in a fresh start or its first sample: both are findings."""
    opened = []

    def crashes(name, do, arguments):
        opened.append((name, do, arguments.get("name")))
        again = do == "decode" or opened.count((name, do, "b")) > 1
        return (name, do, arguments.get("name")) == ("head", "open_decode", "a") or (
            (name, do) == (side, broken) and again
        )

    found = {finding.metric: finding.verdict for finding in sides(crashes)}
    assert found == {"a": Verdict.REGRESS, "b": verdict}


@pytest.fixture
def sides(monkeypatch, tmp_path):
    """Findings of a comparison of timings whose sides answer at once, or crash where they are told to."""

    class Side:
        def __init__(self, name):
            self.name = f"{name} ({name})"

        def ask(self, do, **arguments):
            if crashes[0](self.name.split()[0], do, arguments):
                raise WorkFailed(self.name, f"failed in {do!r}: ImportError: on purpose")
            return {"wall_us": [1], "cpu_us": [1]} if do == "decode" else {"files": {}, "implementation": "i"}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    crashes = []
    monkeypatch.setattr("veloxbench.compare.compare.start", lambda side, revision, threads: Side(side))

    def findings(where):
        crashes[:] = [where]
        revisions = []
        for name in ("base", "head"):
            (tmp_path / name / "site").mkdir(parents=True)
            revisions.append(Revision(name, "c" * 40, tmp_path / name))
        timed = {metric: DecodeSpec(model="m", method="turboquant_mse", target=4) for metric in ("a", "b")}
        plan = Plan(profile=None, timed=timed, spec=TimingSpec(), threads=1, seed=0)
        return compare_revisions(*revisions, plan, lambda text: None)

    return findings


@pytest.fixture
def plans(monkeypatch):
    """What ``compare`` would do, without doing it."""
    kept = []
    monkeypatch.setattr(
        "veloxbench.compare.compare.compare_revisions", lambda base, head, plan, message: kept.append(plan) or []
    )
    monkeypatch.setattr("veloxbench.compare.revisions.prepare", lambda name, repository: None)
    return kept


def test_every_comparison_draws_its_own_order(repository, grid, plans):
    """Another seed each time, and the one that was asked for; one BLAS thread, as in the published error rates."""
    for more in ((), (), ("--seed", "7")):
        compare(repository, grid, "base", "renamed", *more)
    assert len({plan.seed for plan in plans}) == 3
    assert plans[2].seed == 7
    assert {plan.threads for plan in plans} == {1}


def test_uncommitted_changes_are_warned_of(repository, grid, plans, capsys):
    """A revision is what is committed; a file that is not is named as left out."""
    compare(repository, grid, "base", "renamed")
    assert "not compared" not in capsys.readouterr().err
    file = repository / CENTROIDS
    text = file.read_text()
    try:
        file.write_text(text + "\n")
        compare(repository, grid, "base", "renamed")
    finally:
        file.write_text(text)
    assert "1 changed files are not compared" in capsys.readouterr().err


@pytest.mark.slow
def test_two_live_revisions_are_timed_in_turns(repository, grid, cut_model, capsys):
    """Whatever the clock says of two layers in three seconds, it is a verdict of the timing tier, not a crash."""
    more = ("--tiers", "timing", "--model", str(cut_model), "--minutes", "0.05")
    code = compare(repository, grid, "base", "renamed", *more)
    assert code in (ExitCode.PASS, ExitCode.REGRESSION, ExitCode.INCONCLUSIVE)
    assert "decode of turboquant_mse@4" in capsys.readouterr().out


def test_an_unknown_revision_is_named(repository, grid, capsys):
    """Exit code 4."""
    assert compare(repository, grid, "base", "no-such-tag") == ExitCode.USAGE
    assert "unknown revision 'no-such-tag'" in capsys.readouterr().err


def test_a_folder_that_is_no_repository_is_named(tmp_path, grid, capsys):
    """Exit code 4."""
    assert compare(tmp_path, grid, "base", "head") == ExitCode.USAGE
    assert "is not a git repository" in capsys.readouterr().err


def test_an_environment_that_cannot_be_built_keeps_its_log(repository, monkeypatch, grid, capsys):
    """Exit code 5; the sentence names the dependency and the log, which holds what pip said."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert compare(repository, grid, "base", "unbuildable") == ExitCode.ENVIRONMENT
    error = capsys.readouterr().err.splitlines()[-1]
    assert "numpy==0.0.1" in error
    assert "No matching distribution" in Path(error.rpartition("its log is ")[2]).read_text()


def test_a_dependency_that_is_not_here_is_installed_for_that_revision_alone(repository, monkeypatch, tmp_path):
    """A wheel of ours serves as the index; the revision's process imports it, this one cannot."""
    with zipfile.ZipFile(tmp_path / "tinydep-2.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinydep.py", "VERSION = 2\n")
        info = "tinydep-2.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinydep\nVersion: 2.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    revision = prepare("pinned", repository)
    code = "import tinydep as t, veloxquant_mlx as v, veloxbench as b; print(t.VERSION, v.__file__, b.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | revision.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    version, implementation, harness = done.stdout.split()
    assert version == "2"
    assert Path(implementation).resolve().is_relative_to(revision.folder.resolve())
    assert Path(harness).resolve() == Path(veloxbench.__file__).resolve()
    assert importlib.util.find_spec("tinydep") is None


def test_a_revision_is_built_once(repository):
    """The second time finds it in the cache, untouched."""
    first = prepare("base", repository)
    file = first.folder / "tree" / "pyproject.toml"  # a file that is added would be damage, and healed
    before = file.stat().st_ino, file.stat().st_mtime_ns
    assert prepare("base", repository) == first
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before


def test_another_environment_is_another_build(repository, monkeypatch):
    """A distribution that came or went since may meet other dependencies: they are looked at again."""
    first = prepare("base", repository)
    here = list(importlib.metadata.distributions())
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: here[1:])
    other = prepare("base", repository)
    assert other.commit == first.commit
    assert other.folder != first.folder


def test_a_revision_that_is_being_built_is_waited_for(repository):
    """The build of another process holds a lock; this one waits for it and builds nothing beside it."""
    built = prepare("base", repository)
    ready = (built.folder / "ready").read_bytes()
    (built.folder / "ready").unlink()
    file = built.folder / "tree" / "pyproject.toml"
    before = file.stat().st_ino, file.stat().st_mtime_ns
    with ThreadPoolExecutor(1) as pool, FileLock(built.folder.with_suffix(".lock")):
        waiting = pool.submit(prepare, "base", repository)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1.0)
        (built.folder / "ready").write_bytes(ready)
    # the lock is free: what the other process finished is used
    assert waiting.result() == built
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("dependency", "met"),
    [
        ("numpy>=2", True),
        ("NumPy", True),
        ("numpy<1", False),
        ("no-such-distribution-of-ours", False),
        ("numpy<1; python_version < '3'", True),
        ("veloxbench==0", True),
    ],
)
def test_dependencies_are_met_by_name_version_and_marker(dependency, met):
    """PEP 508; the harness itself is the running one whatever a revision asks for."""
    assert unmet_dependencies([dependency], "r") == ([] if met else [dependency])


def test_two_record_sets_are_judged_like_two_revisions(repository, grid, cut_model, tmp_path, capsys):
    """A run against itself passes; records and a revision do not mix; a folder without records is named."""
    out = tmp_path / "out"
    assert _run(["run", "--profile", str(grid), "--out", str(out)]) == ExitCode.PASS
    assert _run(["compare", str(out), str(out)]) == ExitCode.PASS
    assert _run(["compare", str(out), "base", "--repo", str(repository)]) == ExitCode.USAGE
    (tmp_path / "empty").mkdir()
    assert _run(["compare", str(tmp_path / "empty"), str(out)]) == ExitCode.USAGE
    assert "no records at" in capsys.readouterr().err


def test_records_of_other_runs_are_said_to_be_left_out(tmp_path, capsys):
    """A loss outside the last run is not judged, and both sides say how many records were not; whole runs are quiet."""
    for name, kld in (("before", damage(0.058)), ("after", damage(0.1))):
        (tmp_path / name).mkdir()
        records = run_records(kld=kld)
        (tmp_path / name / JOURNAL).write_text("".join(record.to_line() for record in records))
        (tmp_path / name / LAST_RUN).write_text(json.dumps({"keys": [records[0].key]}))
    sides = [str(tmp_path / name) for name in ("before", "after")]
    assert _run(["compare", *sides]) == ExitCode.PASS
    error = capsys.readouterr().err
    assert all(f"3 of the 4 records at {side} are of other runs than the last" in error for side in sides)
    for side in sides:
        (Path(side) / LAST_RUN).unlink()
    assert _run(["compare", *sides]) == ExitCode.REGRESSION
    assert "other runs" not in capsys.readouterr().err


def test_a_worker_that_dies_names_its_side_command_and_log(tmp_path):
    """Killed between two commands, and in the middle of one."""
    worker = Worker("base", log=tmp_path / "log", command=("-c", "import sys; sys.stdin.readline(); sys.exit(7)"))
    with pytest.raises(WorkerError, match=r"base died in 'decode' with exit status 7 \(log: .*log\)"):
        worker.ask("decode")
    with pytest.raises(WorkerError, match="base died in 'hello'"):
        worker.ask("hello")


def test_a_worker_that_hangs_is_ended(tmp_path):
    """No answer in time: the process is killed and the sentence says how long was waited."""
    worker = Worker("head", log=tmp_path / "log", command=("-c", "import time; time.sleep(600)"))
    with pytest.raises(WorkerError, match=r"head gave no answer to 'decode' in 0\.2 s"):
        worker.ask("decode", timeout=0.2)
    with pytest.raises(WorkerError, match="died"):
        worker.ask("hello", timeout=0.2)
