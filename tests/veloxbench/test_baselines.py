"""Baseline files and the commands over them: each thing that can be wrong is one sentence and a code above zero."""

import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from gate_records import HARDWARE, MODEL, NOW, VERSIONS, damage, quality_record, run_records

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import BaselineError
from veloxbench.gate.baselines import (
    QUALITY_LIFE,
    BaselineFile,
    chip_family,
    fingerprint,
    fingerprint_id,
    read_baselines,
)
from veloxbench.records import provenance
from veloxbench.records.store import JOURNAL, LAST_RUN, open_store
from veloxbench.run.grid import load_grid
from veloxbench.run.plan import cells


def write_records(folder: Path, records) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOURNAL).write_text("".join(record.to_line() for record in records))
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git repository with an approved baseline of a small run, and that run's records."""
    for command in (
        ["init", "-q"],
        ["config", "user.name", "Ada"],
        ["config", "user.email", "ada@example.org"],
        ["commit", "-q", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    write_records(tmp_path / "results", run_records())
    assert command_of(tmp_path, "baseline", "approve", "--reason", "first run") == 0
    return tmp_path


def command_of(project: Path, *arguments: str) -> int:
    places = [] if arguments[-1] in ("show", "verify") else ["--records", str(project / "results")]
    return veloxbench([*arguments, *places, "--baseline", str(project / "baselines")])


def files_of(project: Path) -> list[Path]:
    return sorted((project / "baselines").glob("*/*.json"))


def test_gate_passes_on_the_run_that_was_approved(project, capsys):
    """Exit 0, and one sentence."""
    assert command_of(project, "gate") == 0
    assert "veloxbench gate: pass:" in capsys.readouterr().err


def test_approval_keeps_who_why_and_from_which_records(project):
    """The file names the git user, the reason, the commit and the records' ids, and holds the raw samples."""
    records = run_records()
    (file,) = [f for f in read_baselines(project / "baselines").files if f.tier == "quality"]
    approval = file.approvals[0]
    assert (approval.who, approval.why) == ("Ada ada@example.org", "first run")
    head = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert approval.commit == head.stdout.strip()
    by_id = {record.id: record for record in records}
    for entry in file.entries:
        record = by_id[entry.approved.record_id]
        assert {name: record.samples[name] for name in entry.approved.samples} == entry.approved.samples


def test_files_lie_under_their_fingerprint_and_two_commits_share_one(project):
    """The implementation is not in the fingerprint: a new commit finds the baseline of the last."""
    one, other = quality_record(implementation="veloxquant_mlx 1"), quality_record(implementation="veloxquant_mlx 2")
    assert fingerprint(one, "quality") == fingerprint(other, "quality")
    for path in files_of(project):
        assert path.parent.name == fingerprint_id(json.loads(path.read_text())["fingerprint"])


def test_missing_folder_is_exit_3(project, capsys):
    """No baseline at all."""
    assert veloxbench(["gate", "--records", str(project / "results"), "--baseline", str(project / "nowhere")]) == 3
    assert "there is no baseline folder" in capsys.readouterr().err


def test_empty_folder_is_exit_3(project, capsys):
    """A folder without a file."""
    (project / "empty").mkdir()
    assert veloxbench(["gate", "--records", str(project / "results"), "--baseline", str(project / "empty")]) == 3
    assert "is empty" in capsys.readouterr().err


def test_a_figure_changed_by_hand_is_exit_3(project, capsys):
    """Loosening a baseline with an editor is found by its content hash."""
    (path,) = [path for path in files_of(project) if '"quality"' in path.read_text()]
    document = json.loads(path.read_text())
    document["entries"][0]["approved"]["samples"][next(iter(document["entries"][0]["approved"]["samples"]))][0] += 1.0
    path.write_text(json.dumps(document))
    assert command_of(project, "gate") == 3
    assert "edited by hand" in capsys.readouterr().err
    assert command_of(project, "baseline", "verify") == 3


def test_a_moved_file_is_exit_3(project, capsys):
    """A file under another fingerprint's folder is not that baseline."""
    path = files_of(project)[0]
    path.parent.rename(path.parent.with_name("0" * 16))
    assert command_of(project, "gate") == 3
    assert "moved by hand" in capsys.readouterr().err


def test_a_baseline_without_entries_is_not_a_file():
    """An empty list of entries would let everything pass; it cannot be made."""
    with pytest.raises(ValueError, match="no entries"):
        BaselineFile.create(
            tier="exact", suite="exact", fingerprint={}, profiles=("gate",), expires=None, approvals=(), entries=()
        )


@pytest.mark.parametrize("figure", ["NaN", "Infinity"])
def test_nan_in_a_record_is_exit_5_and_named(project, capsys, figure):
    """A figure that is not finite is refused where it is read: file, line and metric."""
    journal = project / "results" / JOURNAL
    lines = journal.read_text().splitlines()
    record = json.loads(lines[1])
    record["metrics"]["kld_mean"]["value"] = float(figure)
    journal.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    assert command_of(project, "gate") == 5
    error = capsys.readouterr().err
    assert f"{JOURNAL}:2" in error
    assert "metrics.kld_mean.value" in error


def test_zero_benchmarks_are_exit_4(project, capsys):
    """An empty results folder is nothing to judge."""
    (project / "results" / JOURNAL).unlink()
    assert command_of(project, "gate") == 4
    assert "nothing was measured" in capsys.readouterr().err


def test_a_removed_benchmark_is_exit_1(project, capsys):
    """A record fewer than approved."""
    write_records(project / "results", run_records()[:-1])
    assert command_of(project, "gate") == 1
    assert "turboquant_mse@2" in capsys.readouterr().err


def test_a_crashed_benchmark_points_to_the_log(project, capsys):
    """The run's errors.log is named beside what is missing."""
    write_records(project / "results", run_records()[:-1])
    (project / "results" / "errors.log").write_text("ValueError: boom\n")
    assert command_of(project, "gate") == 1
    assert "errors.log says what crashed" in capsys.readouterr().err


def test_a_benchmark_that_produced_nothing_is_exit_1(project, capsys):
    """Its record is there, its gated metrics are not: the first of them is named."""
    nothing = quality_record("turboquant_mse", 2.0, drop=("kld_mean", "delta_nll"))
    write_records(project / "results", [*run_records()[:-1], nothing])
    assert command_of(project, "gate") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "regress: quality, smollm2-135m chunked turboquant_mse@2, delta_nll: the run did not produce it" in error


def test_records_of_other_code_are_no_result_of_this_one(project, capsys):
    """A cache was edited and nothing was run: yesterday's records are refused, and the command that helps is named."""
    for other in ({"implementation": "veloxquant_mlx edited"}, {"harness": "edited"}):
        write_records(project / "results", run_records(**other))
        assert command_of(project, "gate") == 4
        error = capsys.readouterr().err
        assert "of other code than this" in error
        assert "`veloxbench run --profile gate --out" in error
        assert command_of(project, "baseline", "approve", "--reason", "old") == 4


def test_records_of_a_clock_that_is_wrong_are_refused(project, capsys):
    """A record of 2099 would be the newest for decades."""
    write_records(project / "results", run_records(started=datetime(2099, 1, 1, tzinfo=UTC)))
    assert command_of(project, "gate") == 4
    assert "2099-01-01: the clock was wrong" in capsys.readouterr().err


def test_a_run_that_ended_before_its_plan_leaves_nothing_to_judge(project, capsys):
    """The records of the run before are not its result: exit 4."""
    with open_store(project / "results") as store:
        store.begin()
    assert command_of(project, "gate") == 4
    assert "before it knew what to measure" in capsys.readouterr().err


def test_a_baseline_travels_to_another_rounding(project, capsys):
    """Another thread count or instruction set draws the noise anew: judged all the same, and said."""
    rng = np.random.default_rng(3)
    redrawn = damage(0.058) * (1 + 0.1 * rng.standard_normal(16))  # the measured spread of a redraw, docs/gate.md
    write_records(project / "results", run_records(kld=redrawn, hardware={**HARDWARE, "rounding": "s"}))
    code = command_of(project, "gate", "--json")
    findings = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["tier"] == "quality"]
    assert code in (0, 2)
    assert {each["verdict"] for each in findings} <= {"pass", "inconclusive"}
    assert all("another rounding" in each["reason"] for each in findings)


def test_too_few_sequences_are_refused_when_approved(project, capsys):
    """What the gate would call inconclusive for ever is said at once."""
    write_records(project / "results", run_records(kld=damage(0.058, n=2), delta_nll=damage(0.064, 1, n=2)))
    assert command_of(project, "baseline", "approve", "--reason", "two") == 4
    assert "a gate needs 16 sequences" in capsys.readouterr().err


def test_damaged_keys_of_the_last_run_are_exit_5(project, capsys):
    """They are never read around."""
    (project / "results" / LAST_RUN).write_text('{"keys": [')
    assert command_of(project, "gate") == 5
    assert LAST_RUN in capsys.readouterr().err


def test_another_model_is_exit_3(project, capsys):
    """Other weights under the same name."""
    write_records(project / "results", run_records(model=MODEL.model_copy(update={"weights_sha256": "v" * 64})))
    assert command_of(project, "gate") == 3
    assert "weights_sha256" in capsys.readouterr().err


ELSEWHERE = {**HARDWARE, "machine": "arm64", "chip": "Apple M4 Pro"}


def test_another_machine_is_exit_3(project, capsys):
    """Records of another chip family, through the command line: the field that differs is named."""
    write_records(project / "results", run_records(hardware=ELSEWHERE))
    assert command_of(project, "gate") == 3
    assert "chip_family is apple-silicon here and x86-64 there" in capsys.readouterr().err


def test_an_unknown_machine_can_be_held_to_the_exact_tier(project, capsys):
    """``--unknown-machine exact``: exit 0, and a sentence that quality was not judged; what is gone is exit 1."""
    write_records(project / "results", run_records(hardware=ELSEWHERE))
    assert command_of(project, "gate", "--unknown-machine", "exact") == 0
    error = capsys.readouterr().err
    assert "chip_family apple-silicon" in error
    assert "quality was not judged" in error
    write_records(project / "results", run_records(hardware=ELSEWHERE)[:-1])
    assert command_of(project, "gate", "--unknown-machine", "exact") == 1


@pytest.mark.parametrize("hardware", [HARDWARE, ELSEWHERE])
def test_a_new_mlx_is_no_unknown_machine(project, hardware, capsys):
    """A raised pin does not switch the quality tier off, on no machine: exit 3, and the field is named."""
    new = {"versions": {**VERSIONS, "mlx": "0.33.0"}, "hardware": hardware}
    write_records(project / "results", run_records(**new))
    assert command_of(project, "gate", "--unknown-machine", "exact") == 3
    assert "mlx is 0.33 here and 0.32 there" in capsys.readouterr().out


def test_a_new_mlx_approved_elsewhere_is_not_approved_here(project):
    """Two machines, the new MLX approved on the other one alone: exit 3 here; on a third machine, the exact tier."""
    new = {**VERSIONS, "mlx": "0.33.0"}
    write_records(project / "results", run_records(versions=new, hardware=ELSEWHERE))
    assert command_of(project, "baseline", "approve", "--reason", "new MLX") == 0
    write_records(project / "results", run_records(versions=new))
    assert command_of(project, "gate", "--unknown-machine", "exact") == 3
    write_records(project / "results", run_records(versions=new, hardware={**HARDWARE, "machine": "riscv64"}))
    assert command_of(project, "gate", "--unknown-machine", "exact") == 0


@pytest.mark.parametrize("wrong", ["expired", "edited", "missing", "no quality file", "another model", "lost quality"])
def test_what_is_wrong_with_a_baseline_is_no_unknown_machine(project, monkeypatch, wrong):
    """An expired, edited or missing baseline stays exit 3 under ``--unknown-machine exact``, and a loss exit 1."""
    (path,) = [path for path in files_of(project) if '"quality"' in path.read_text()]
    match wrong:
        case "expired":
            monkeypatch.setattr("veloxbench.gate.baselines.QUALITY_LIFE", timedelta(days=-1))
            path.unlink()
            assert command_of(project, "baseline", "approve", "--reason", "long ago") == 0
        case "edited":
            path.write_text(path.read_text().replace("first run", "second run"))
        case "missing":
            (project / "baselines").rename(project / "elsewhere")
        case "no quality file":
            path.unlink()
        case "another model":
            write_records(project / "results", run_records(model=MODEL.model_copy(update={"tokenizer_sha256": "v"})))
        case "lost quality":
            write_records(project / "results", run_records(kld=damage(0.5)))
    assert command_of(project, "gate", "--unknown-machine", "exact") == (1 if wrong == "lost quality" else 3)


def test_an_unknown_profile_is_exit_4(project, capsys):
    """A misspelt profile lists near matches."""
    assert command_of(project, "gate", "--profile", "gat") == 4
    assert "did you mean gate" in capsys.readouterr().err


def test_json_and_junit_say_the_same(project, capsys):
    """The machine-readable forms carry the verdict, every finding and the failure."""
    write_records(project / "results", run_records(kld=damage(0.5)))
    junit = project / "gate.xml"
    assert command_of(project, "gate", "--json", "--junit", str(junit)) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["verdict"], printed["exit_code"]) == ("regress", 1)
    suite = ET.parse(junit).getroot()
    assert int(suite.attrib["tests"]) == len(printed["findings"]) == len(suite.findall("testcase"))
    failed = [finding for finding in printed["findings"] if finding["verdict"] == "regress"]
    assert int(suite.attrib["failures"]) == len(failed) == len(suite.findall("testcase/failure")) > 0


def test_junit_onto_a_device_is_written_to_it(project):
    """A user's path is the user's: ``--junit /dev/null`` stays a device."""
    assert command_of(project, "gate", "--junit", "/dev/null") == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("broken", "code", "reason"),
    [
        (lambda project: shutil.rmtree(project / "baselines"), 3, "there is no baseline folder"),
        (lambda project: (project / "results" / JOURNAL).unlink(), 4, "nothing was measured"),
        (lambda project: (project / "results" / JOURNAL).write_text("{}\n"), 5, f"{JOURNAL}:1"),
    ],
)
def test_a_gate_that_cannot_judge_says_so_to_machines_too(project, capsys, monkeypatch, broken, code, reason):
    """JSON, JUnit, annotation and summary hold one error, which says what standard error says; the code stays."""
    broken(project)
    junit, page = project / "gate.xml", project / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert command_of(project, "gate", "--json", "--junit", str(junit)) == code
    said = capsys.readouterr()
    printed = json.loads(said.out)
    assert (printed["verdict"], printed["exit_code"], len(printed["findings"])) == ("no-baseline", code, 1)
    (error,) = ET.parse(junit).getroot().findall("testcase/error")
    annotation, sentence = said.err.splitlines()
    assert annotation.startswith("::error ")
    for text in (printed["findings"][0]["reason"], error.attrib["message"], annotation, sentence, page.read_text()):
        assert reason in text


def test_approve_refuses_a_changed_checkout(project, capsys):
    """A tracked file that differs from the commit: exit 4, nothing is written."""
    (project / "code.py").write_text("a = 1\n")
    subprocess.run(["git", "-C", str(project), "add", "code.py"], check=True)
    before = [path.read_bytes() for path in files_of(project)]
    write_records(project / "results", run_records(kld=damage(0.05)))
    assert command_of(project, "baseline", "approve", "--reason", "better") == 4
    assert "changed files" in capsys.readouterr().err
    assert [path.read_bytes() for path in files_of(project)] == before


@pytest.mark.parametrize("where", [{"dirty": True}, {"dirty": None, "project_dirty": True}])
def test_approve_refuses_records_from_a_changed_checkout(project, capsys, where):
    """What was measured on uncommitted code, the harness's or the measured project's, is nobody's baseline."""
    write_records(project / "results", run_records(**where))
    assert command_of(project, "baseline", "approve", "--reason", "quick fix") == 4
    assert "measured in a changed checkout" in capsys.readouterr().err


def test_approve_refuses_what_no_checkout_vouches_for(project, capsys):
    """Records from outside every checkout: exit 4, unless ``--unknown-checkout`` says that somebody knows."""
    write_records(project / "results", run_records(dirty=None, kld=damage(0.05)))
    assert command_of(project, "baseline", "approve", "--reason", "measured in a container") == 4
    assert "--unknown-checkout" in capsys.readouterr().err
    assert command_of(project, "baseline", "approve", "--reason", "in a container", "--unknown-checkout") == 0
    write_records(project / "results", run_records(dirty=None, project_dirty=False))
    assert command_of(project, "baseline", "approve", "--reason", "a clean project of one's own") == 0


def test_the_measured_projects_checkout_is_looked_at(project, tmp_path_factory):
    """A repository around the working directory, clean and then not; none of it where there is no repository."""
    (project / "cache.py").write_text("a = 1\n")
    subprocess.run(["git", "-C", str(project), "add", "cache.py"], check=True)
    commit = subprocess.run(
        ["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert provenance.project_state(project) == (commit.stdout.strip(), True)
    assert provenance.project_state(tmp_path_factory.mktemp("outside")) == (None, None)


def test_approve_needs_a_reason(project, capsys):
    """An empty reason is none."""
    assert command_of(project, "baseline", "approve", "--reason", " ") == 4
    assert "--reason" in capsys.readouterr().err


def test_approve_twice_keeps_the_release_and_both_reasons(project):
    """The second approval's values are gated against; drift still counts from the first."""
    write_records(project / "results", run_records(kld=damage(0.05)))
    assert command_of(project, "baseline", "approve", "--reason", "better rotation") == 0
    (file,) = [f for f in read_baselines(project / "baselines").files if f.tier == "quality"]
    assert [approval.why for approval in file.approvals] == ["first run", "better rotation"]
    entry = file.by_subject["smollm2-135m chunked turboquant_mse@4"]
    assert entry.approved.samples["kld_mean"] == damage(0.05).tolist()
    assert entry.at_release.samples["kld_mean"] == damage(0.058).tolist()
    assert command_of(project, "gate") == 0


def test_a_release_counts_drift_anew(project):
    """``--release`` makes the approved values the ones that drift is counted from."""
    write_records(project / "results", run_records(kld=damage(0.05)))
    assert command_of(project, "baseline", "approve", "--reason", "0.2.0", "--release", "0.2.0") == 0
    (file,) = [f for f in read_baselines(project / "baselines").files if f.tier == "quality"]
    assert all(entry.at_release == entry.approved for entry in file.entries)
    assert file.approvals[-1].release == "0.2.0"


def test_a_partial_run_forgets_nothing_unless_told(project):
    """Approving three of four subjects keeps the fourth; ``--drop-missing`` removes it."""
    write_records(project / "results", run_records(kld=damage(0.05))[:-1])
    assert command_of(project, "baseline", "approve", "--reason", "three of four") == 0
    assert all(len(file.entries) == 4 for file in read_baselines(project / "baselines").files)
    write_records(project / "results", run_records(kld=damage(0.051))[:-1])
    assert command_of(project, "baseline", "approve", "--reason", "2 bits is gone", "--drop-missing") == 0
    (file,) = [f for f in read_baselines(project / "baselines").files if f.tier == "quality"]
    assert len(file.entries) == 3


def test_an_entry_expires_by_its_own_measurement(project, capsys):
    """Approving two subjects today gives the two that were measured long ago no new year: they are exit 3, by name."""
    old, new = NOW - QUALITY_LIFE - timedelta(days=1), run_records()
    for path in files_of(project):
        path.unlink()
    write_records(project / "results", run_records(started=old))
    assert command_of(project, "baseline", "approve", "--reason", "a year ago") == 0
    write_records(project / "results", new[:2])
    assert command_of(project, "baseline", "approve", "--reason", "two of four") == 0
    (file,) = [f for f in read_baselines(project / "baselines").files if f.tier == "quality"]
    assert file.expires == (old + QUALITY_LIFE).date()
    write_records(project / "results", new)
    capsys.readouterr()
    assert command_of(project, "gate", "--json") == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    late = {finding["subject"] for finding in findings if "expired on" in finding["reason"]}
    assert late == {"smollm2-135m chunked turboquant_mse@4", "smollm2-135m chunked turboquant_mse@2"}
    assert command_of(project, "baseline", "verify") == 3
    assert "turboquant_mse" in capsys.readouterr().err


def test_committed_quality_baselines_last_a_year_from_their_measurement():
    """Each holds through the 365th day after its first entry was measured, and that entry has expired the day after.

    Whether that day has come is `veloxbench baseline verify`'s to say: a test that did would fail an old commit.
    """
    files = [f for f in read_baselines(Path(__file__).parents[2] / "baselines").files if f.tier == "quality"]
    assert files
    for file in files:
        first = min(file.entries, key=lambda entry: entry.approved.measured)
        last_day = first.approved.measured.date() + timedelta(days=365)
        assert file.expires == last_day
        assert not file.expired(last_day)
        assert file.expired(last_day + timedelta(days=1))[first.subject] == last_day


def test_diff_says_what_would_change_and_writes_nothing(project, capsys):
    """The subjects that moved, with both values."""
    before = [path.read_bytes() for path in files_of(project)]
    write_records(project / "results", run_records(kld=damage(0.05)))
    assert command_of(project, "baseline", "diff") == 0
    assert "~ smollm2-135m chunked turboquant_mse@4: kld_mean" in capsys.readouterr().out
    assert [path.read_bytes() for path in files_of(project)] == before


def test_show_and_verify(project, capsys):
    """Who approved why, and that all is as approved."""
    places = ["--baseline", str(project / "baselines")]
    assert veloxbench(["baseline", "show", *places]) == 0
    assert "Ada ada@example.org: first run" in capsys.readouterr().out
    assert veloxbench(["baseline", "verify", *places]) == 0


def test_reading_names_the_file_and_the_field(tmp_path):
    """A file that is not a baseline at all."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "perplexity.json").write_text('{"tier": "exact"}')
    with pytest.raises(BaselineError, match=r"perplexity.json cannot be used as a baseline: suite"):
        read_baselines(tmp_path)


def test_committed_baselines_hold_the_whole_gate_profile():
    """The repository's own baselines are as approved, and every cell of the gate profile has its entry."""
    files = read_baselines(Path(__file__).parents[2] / "baselines").of_profile("gate")
    for tier, suites in (("exact", {"exact", "kernels", "perplexity"}), ("quality", {"perplexity"})):
        held = {name for file in files if file.tier == tier for name in file.by_subject}
        for cell in cells(load_grid("gate")):
            if cell.suite in suites:
                model = "no model" if cell.suite == "exact" else "smollm2-135m"
                assert f"{model} {cell.protocol} {cell.arm.label}" in held


def test_committed_quality_baselines_are_of_these_machines():
    """MKL's compatible and its AVX2 path, each whole: a deleted file does not pass for a machine that nobody knows."""
    files = read_baselines(Path(__file__).parents[2] / "baselines").of_profile("gate")
    roundings = {file.fingerprint["rounding"]: len(file.entries) for file in files if file.tier == "quality"}
    n_arms = len([cell for cell in cells(load_grid("gate")) if cell.suite == "perplexity"])
    assert roundings == {"390104a18103a34c": n_arms, "2970b9127cb94b01": n_arms}


@pytest.mark.parametrize(
    ("machine", "chip", "family"),
    [
        ("x86_64", "AMD EPYC", "x86-64"),
        ("AMD64", "Intel(R) Xeon(R)", "x86-64"),
        ("arm64", "Apple M4 Pro", "apple-silicon"),
        ("aarch64", "Neoverse-N1", "arm64"),
    ],
)
def test_chips_of_a_family(machine, chip, family):
    """Two x86 chips are one family, an Apple chip and another ARM are two."""
    assert chip_family({"machine": machine, "chip": chip}) == family


@pytest.mark.parametrize(
    "command", [["gate"], ["baseline"], *(["baseline", c] for c in ("show", "diff", "approve", "verify"))]
)
def test_help_of_every_command(command, capsys):
    """``--help`` says what it does."""
    assert veloxbench([*command, "--help"]) == 0
    assert len(capsys.readouterr().out.split()) > 15
