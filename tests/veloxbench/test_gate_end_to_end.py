"""The gate judges this code, and nothing else: the real model cut to two layers is measured, approved, judged and
damaged, through both front doors.
"""

import ast
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_grids import IN_MEMORY, quality_grid

from veloxbench.cli.app import _run as veloxbench
from veloxbench.records import provenance
from veloxbench.records.store import LAST_RUN, read_records
from veloxquant_mlx.quantizers import turboquant_mse

ROOT = Path(__file__).parents[2]
GRID = quality_grid(["turboquant_mse@4"], layers="n_layers = 2\nthroughput = []", tables=IN_MEMORY)


@pytest.fixture(scope="module")
def approved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile, the records of its run and the baseline made of them."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "mine.toml").write_text(GRID)
    with pytest.MonkeyPatch.context() as patch:
        # the tests' own checkout may have changes; whose it is does not matter here
        patch.setattr(provenance, "git_state", lambda: ("c" * 40, False))
        assert run(folder, "results") == 0
    assert veloxbench(["baseline", "approve", "--reason", "first", *places(folder, "results")]) == 0
    return folder


def run(folder: Path, out: str, *more: str) -> int:
    return veloxbench(["run", "--profile", str(folder / "mine.toml"), "--out", str(folder / out), *more])


def places(folder: Path, out: str) -> list[str]:
    return [
        "--records", str(folder / out), "--baseline", str(folder / "baselines"), "--profile", str(folder / "mine.toml")
    ]  # fmt: skip


def test_the_same_program_measured_again_passes_without_any_change(approved, capsys):
    """``--fresh`` measures anew what is recorded, and gives the same samples to the last bit."""
    assert run(approved, "results", "--fresh") == 0
    assert "2 measured, 0 recorded before" in capsys.readouterr().err
    assert veloxbench(["gate", "--json", *places(approved, "results")]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["change"] for finding in findings if finding["tier"] == "quality"] == [0.0, 0.0, 0.0]


def test_centroids_five_percent_off_are_a_regression_of_quality(approved, monkeypatch, capsys):
    """Damage in the decoder, through the real cache and the real model: exit 1, KLD above its limit."""
    original = turboquant_mse.unpack_unrotate
    monkeypatch.setattr(turboquant_mse, "unpack_unrotate", lambda *arguments: original(*arguments) * 1.05)
    assert run(approved, "damaged") == 0
    capsys.readouterr()
    assert veloxbench(["gate", "--json", *places(approved, "damaged")]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    regressed = {(finding["tier"], finding["metric"]) for finding in findings if finding["verdict"] == "regress"}
    assert ("quality", "kld_mean") in regressed


def test_a_measurement_that_raises_is_a_regression(approved, monkeypatch, capsys):
    """The decoder raises in the middle of a run: no record, exit 1 of the run and of the gate, and one sentence."""

    def raising(*_):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(turboquant_mse, "unpack_unrotate", raising)
    assert run(approved, "crashed") == 1
    capsys.readouterr()
    assert veloxbench(["gate", *places(approved, "crashed")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "turboquant_mse@4" in error
    assert "did not produce it" in error
    # what the run was to make, beside what it made
    keys = json.loads((approved / "crashed" / LAST_RUN).read_text())["keys"]
    (made,) = read_records(approved / "crashed")
    assert len(keys) == 2
    assert made.key in keys
    log = approved / "crashed" / "errors.log"
    assert f"{log} says what crashed" in error
    assert "broken on purpose" in log.read_text()


@pytest.fixture
def pytest_gate(approved, capsys):
    """``pytest suites --benchmark`` as a call: exit code, output and the cases of its JUnit file."""

    def session(
        *modules: str, baseline: str = "baselines", more: Sequence[str] = ()
    ) -> tuple[int, str, list[ET.Element]]:
        junit = approved / "junit.xml"
        command = [*(str(ROOT / "suites" / f"{name}.py") for name in modules), "--benchmark", "-q"]
        command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
        command += ["--veloxbench-profile", str(approved / "mine.toml"), "--veloxbench-out", str(approved / "results")]
        command += ["--veloxbench-baseline", str(approved / baseline), "--junitxml", str(junit), *more]
        capsys.readouterr()
        junit.unlink(missing_ok=True)
        code = int(pytest.main(command))
        said = capsys.readouterr()
        cases = list(ET.parse(junit).iter("testcase")) if junit.exists() else []
        return code, said.out + said.err, cases

    return session


def test_gates_are_pytest_items(pytest_gate):
    """Each subject of the baselines is an item with its figures in the JUnit file, after the measurements."""
    code, output, cases = pytest_gate("test_perplexity", "test_gate")
    assert code == 0, output
    gates = [case for case in cases if "test_subject_is_as_good" in case.attrib["name"]]
    # fp16 and one arm, each in the exact and in the quality tier
    assert len(gates) == 4
    properties = {item.attrib["name"] for case in gates for item in case.iter("property")}
    assert {"kld_mean.change", "kld_mean.limit", "nll.value"} <= properties
    names = [case.attrib["name"] for case in cases]
    assert names.index(gates[0].attrib["name"]) > names.index(
        "test_arm_reads_what_its_cache_stores[smollm2-135m-chunked-fp16]"
    )


@pytest.mark.parametrize("asserts", ["rewrite", "plain"])
def test_a_gated_metric_that_no_item_produced_fails(pytest_gate, asserts):
    """Selecting the gates alone measures nothing, which is no pass, whatever becomes of ``assert``."""
    code, output, cases = pytest_gate("test_gate", more=[f"--assert={asserts}"])
    assert code == 1
    assert all(case.find("failure") is not None for case in cases)
    assert "nothing was judged" in output


def test_a_missing_baseline_fails_the_session(pytest_gate):
    """Measuring with gates but without baselines fails, and says how to make one."""
    code, output, _ = pytest_gate("test_gate", baseline="nowhere")
    assert code == 1
    assert "there is no baseline folder" in output


def test_several_processes_are_refused(pytest_gate):
    """``-n 2`` would time measurements beside each other, and no gate would see them all: one sentence, exit 4."""
    code, output, _ = pytest_gate("test_perplexity", "test_gate", more=["-n", "2"])
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--benchmark measures in one process: leave -n out" in output


def test_no_verdict_of_the_suites_is_an_assert():
    """Python leaves ``assert`` out under ``-O``: the gates' module has none."""
    tree = ast.parse((ROOT / "suites" / "test_gate.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
