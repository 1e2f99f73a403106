"""``veloxbench run`` as a user types it, on a model and a text that the repository has never seen."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.records.store import JOURNAL, read_records


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(
        "".join(f"Paragraph {i}: the quick brown fox jumps over {i * i} lazy dogs.\n\n" for i in range(600))
    )
    return path


def test_a_strangers_model_and_text_give_a_page(cut_model, own_text, grid_file, tmp_path, capsys):
    """Local directory, local .txt, chosen methods and targets: records, tables and JSON agree; fp16 reads 16.000."""
    out = tmp_path / "out"
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--corpus", str(own_text)]
    arguments += ["--methods", "mlx-affine,turboquant_mse", "--targets", "4,2", "--out", str(out)]
    assert veloxbench([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    records = read_records(out)
    assert {record.id for record in records} == {record["id"] for record in printed["records"]}
    labels = {record.subject.method.label for record in records}
    assert labels == {"fp16", "mlx-affine@4", "mlx-affine@2", "turboquant_mse@4", "turboquant_mse@2"}
    page = (out / "BENCHMARK_RESULTS.md").read_text()
    assert "## Choosing a target" in page
    fp16 = [r for r in records if r.subject.method.name == "fp16" and r.subject.suite == "perplexity"]
    assert [r.metrics["bits_per_value"].value for r in fp16] == [16.0, 16.0]
    for record in records:
        assert all(layer.engaged for layer in record.engagement)
        # nobody states a licence of a folder or a file
        assert (record.provenance.model_licence, record.provenance.text_licence) == (None, None)

    before = (out / JOURNAL).read_bytes()
    assert veloxbench(arguments) == 0
    assert (out / JOURNAL).read_bytes() == before, "a second run measured something again"


def test_memory_suite_in_its_own_process(cut_model, grid_file, tmp_path):
    """The bytes held equal the formula exactly, fp16 reads 16.000, and MLX holds nothing that is not counted."""
    out = tmp_path / "out"
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--suites", "memory"]
    assert veloxbench([*arguments, "--methods", "turboquant_mse", "--targets", "3", "--out", str(out)]) == 0
    by_label = {record.subject.method.label: record for record in read_records(out)}
    assert by_label["fp16"].metrics["bits_per_value"].value == 16.0
    # 3-bit codes of head_dim 64 fill six words exactly, and the norm costs 16/64
    assert by_label["turboquant_mse@3"].metrics["bits_per_value"].value == 3.25
    for record in by_label.values():
        assert record.provenance.text_licence == "public domain"  # the bundled text's
        # the allocator rounds buffers up to pages; an fp16 copy of what is cached would be 98 kB
        assert 0 <= record.metrics["unaccounted_bytes"].value < 32 * 1024


def test_the_memory_suite_counts_widths_that_the_data_chose(cut_model, grid_file, tmp_path):
    """Formula and arrays agree after the prefill and after the decode steps, though each block chose its width."""
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--suites", "memory"]
    method = ["--methods", "turboquant_prod_adaptive:distortion_threshold=0.2", "--targets", "4"]
    assert veloxbench([*arguments, *method, "--out", str(tmp_path)]) == 0
    assert {record.status for record in read_records(tmp_path)} == {"measured"}


def test_a_configuration_that_mlx_lm_refuses_is_a_row_not_a_crash(cut_model, grid_file, tmp_path, capsys):
    """Group 128 does not divide head_dim 64: the record says who does not support it, and nothing calls it measured."""
    out = tmp_path / "out"
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--suites", "perplexity"]
    assert veloxbench([*arguments, "--methods", "mlx-affine:group_size=128", "--targets", "4", "--out", str(out)]) == 0
    assert "2 measured, 2 not supported, 0 recorded before, 0 failed" in capsys.readouterr().err
    refused = [record for record in read_records(out) if record.status == "unsupported"]
    assert len(refused) == 2
    assert "not supported by mlx-lm" in (out / "BENCHMARK_RESULTS.md").read_text()


def test_a_crash_is_kept_for_the_page_until_it_is_measured(cut_model, grid_file, tmp_path, monkeypatch):
    """A measurement that crashed is named on the page, also by ``report``; measured by the next run, it is not."""
    from veloxbench.measure import quality

    out = tmp_path / "out"
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--suites", "perplexity"]
    arguments += ["--methods", "turboquant_mse", "--targets", "4", "--out", str(out)]
    page = out / "BENCHMARK_RESULTS.md"
    with monkeypatch.context() as patch:
        patch.setattr(quality, "arm_metrics", lambda *_: 1 // 0)
        assert veloxbench(arguments) == 1
    failed = "perplexity/decode turboquant_mse@4"
    assert re.search(f"- {cut_model.name} {failed}, .*: ZeroDivisionError", page.read_text())
    assert veloxbench(["report", str(out), "--check", str(page)]) == 0
    assert veloxbench(arguments) == 0
    assert "ZeroDivisionError" not in page.read_text()


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_loses_nothing_and_measures_nothing_twice(n_kills, cut_model, grid_file, tmp_path):
    """kill -9 at seeded moments: every restart goes on, finished records stay, keys and ids are unique."""
    rng = random.Random(0)
    command = [
        sys.executable,
        "-m",
        "veloxbench.cli",
        "run",
        "--profile",
        str(grid_file),
        "--models",
        str(cut_model),
    ]
    kills, folder_number, finished_runs = 0, 0, 0
    while kills < n_kills or finished_runs == 0:
        out = tmp_path / f"out{folder_number}"
        known = {record.key: record.id for record in read_records(out)}
        process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "measurements" in line:
                break
        if kills < n_kills:
            time.sleep(rng.uniform(0, 2.0))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        errors = process.communicate()[1]
        records = {record.key: record.id for record in read_records(out)}
        assert known.items() <= records.items(), "a finished record was lost or measured again"
        assert len(set(records.values())) == len(records)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, errors
            assert len(records) == 12
            finished_runs += 1
            folder_number += 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--models", "smolm2-135m"], 4, "unknown model 'smolm2-135m'; did you mean smollm2-135m"),
        (["--methods", "turboqant"], 4, "unknown method 'turboqant'; did you mean turboquant_mse"),
        (["--methods", "mlx-affine:group=32"], 4, "unknown parameter of mlx-affine 'group'; did you mean group_size"),
        (["--methods", "turboquant_mse", "--targets", "1.5"], 4, "turboquant_mse cannot meet target 1.5"),
        (["--targets", "four"], 4, "--targets 'four' must be numbers"),
        (["--corpus", "wikitxt"], 4, "unknown corpus 'wikitxt'; did you mean wikitext-2"),
        (["--suites", "perplexty"], 4, "unknown suite 'perplexty'; did you mean perplexity"),
        (["--profile", "quik"], 4, "unknown profile 'quik'; did you mean quick"),
        (["--memory-budget", "-1"], 4, "--memory-budget -1.0 must be a finite number above zero"),
        (["--nonsense"], 4, "No such option: --nonsense"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_4(arguments, code, sentence, tmp_path, capsys):
    """A wrong name or value lists near matches or the rule; nothing is written."""
    assert veloxbench(["run", "--out", str(tmp_path / "out"), *arguments]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_a_text_shorter_than_a_window_names_both_lengths(cut_model, grid_file, tmp_path, capsys):
    """The text has too few tokens: exit 4, before anything is measured."""
    short = tmp_path / "short.txt"
    short.write_text("Too short to fill a window, however you read it.")
    code = veloxbench(
        [
            "run",
            "--profile",
            str(grid_file),
            "--models",
            str(cut_model),
            "--corpus",
            str(short),
            "--out",
            str(tmp_path / "o"),
        ]
    )
    assert code == 4
    assert "tokens" in capsys.readouterr().err


def test_a_window_beyond_the_models_context_is_refused(cut_model, grid_file, tmp_path, capsys):
    """A model made for 32 tokens is not measured at 48."""
    small = tmp_path / "small-context"
    shutil.copytree(cut_model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    assert veloxbench(["run", "--profile", str(grid_file), "--models", str(small), "--out", str(tmp_path / "o")]) == 4
    assert "needs 48 tokens of context" in capsys.readouterr().err


def test_an_unwritable_output_is_exit_5(grid_file, tmp_path, capsys):
    """--out below a file cannot be made."""
    (tmp_path / "file").write_text("")
    assert veloxbench(["run", "--profile", str(grid_file), "--out", str(tmp_path / "file" / "out")]) == 5
    assert "cannot write to the output folder" in capsys.readouterr().err


def test_a_model_without_attention_layers_is_one_sentence(cut_model, grid_file, tmp_path, capsys):
    """A Mamba has states, not keys and values: exit 4 and the reason."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import mamba

    config = {
        "model_type": "mamba", "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "state_size": 4,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 2048,
    }  # fmt: skip
    folder = tmp_path / "mamba"
    folder.mkdir()
    model = mamba.Model(mamba.ModelArgs.from_dict(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cut_model / name, folder / name)
    assert veloxbench(["run", "--profile", str(grid_file), "--models", str(folder), "--out", str(tmp_path / "o")]) == 4
    assert "no standard attention layers" in capsys.readouterr().err


def test_report_check_tells_a_stale_page(cut_model, grid_file, tmp_path, capsys):
    """``report --check`` passes on the page that the records make and fails when a figure was typed."""
    out = tmp_path / "out"
    arguments = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--suites", "perplexity"]
    assert veloxbench([*arguments, "--methods", "turboquant_mse", "--targets", "4", "--out", str(out)]) == 0
    page = out / "BENCHMARK_RESULTS.md"
    assert veloxbench(["report", str(out), "--check", str(page)]) == 0
    page.write_text(page.read_text().replace("16.000", "15.000"))
    assert veloxbench(["report", str(out), "--check", str(page)]) == 1
    assert "is stale" in capsys.readouterr().err


def test_no_records_is_a_sentence(tmp_path, capsys):
    """``report`` on an empty place says how to make records."""
    assert veloxbench(["report", str(tmp_path / "nothing")]) == 4
    assert "there are no records" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(cut_model, grid_file, tmp_path, monkeypatch, capsys):
    """Stopped in the second of four: exit 130, one is kept, and the same command measures the other three."""
    from veloxbench.run import runner

    measure, calls = runner.measure, iter(range(100))

    def stopped_in_the_second(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(runner, "measure", stopped_in_the_second)
    command = ["run", "--profile", str(grid_file), "--models", str(cut_model), "--suites", "perplexity"]
    command += ["--methods", "turboquant_mse@4", "--out", str(tmp_path / "out")]
    assert veloxbench(command) == 130
    said = capsys.readouterr().err
    assert f"stopped; 1 of 4 measurements are kept in {tmp_path / 'out'}; type the same command again to go on" in said
    assert veloxbench(command) == 0
    assert "3 measured, 1 recorded before, 0 failed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "report", "models", "corpora", "methods", "doctor", "schema"])
def test_help_teaches_every_command(command, capsys):
    """``--help`` of each command says what it does."""
    assert veloxbench([command, "--help"]) == 0
    assert len(capsys.readouterr().out.split()) > 15
