"""``python -m veloxquant_mlx.calibration``: from a model's folder and a text to caches that generate."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import save_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "impl"))

from impl_inputs import tiny_llama

from veloxquant_mlx.calibration.__main__ import main
from veloxquant_mlx.calibration.fisher_klt import FisherCode


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of kilobytes in mlx-lm's form."""
    folder, model = tmp_path_factory.mktemp("tiny"), tiny_llama(head_dim=32)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {name: value for name, value in dataclasses.asdict(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, model.args.vocab_size)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["calibration", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_calibration_is_made_and_serves(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model, few sequences: the file's caches hold what the command says, and the target is met.

    Measurements are used again for another scope: the second call takes no gradients.
    """
    import mlx_lm

    text, out, kept = tmp_path / "a.txt", tmp_path / "a.safetensors", tmp_path / "m.npz"
    words = np.random.default_rng(0).integers(0, 128, 6000)
    text.write_text(" ".join(f"w{word}" for word in words), encoding="utf-8")
    options = ["--text", text, "--gradient-sequences", "1", "--vector-sequences", "4", "--measurements", kept]
    assert run(monkeypatch, model_folder, "--out", out, "--target", "3", *options) == 0
    assert "bits a value at 2048 tokens" in " ".join(capsys.readouterr().err.split())
    model, tokenizer = mlx_lm.load(str(model_folder))[:2]
    made = FisherCode.load(out, scope="below")
    assert 3 * 0.985 <= made.bits_per_value <= 3
    caches = made.caches(model)
    tokens = np.array(tokenizer.encode(text.read_text(encoding="utf-8")[:2000]))[:200]
    logits = model(mx.array(tokens[None]), cache=caches)
    assert mx.isfinite(logits).all().item()
    assert [cache.offset for cache in caches] == [200] * 3
    assert run(monkeypatch, model_folder, "--out", out, "--scope", "head", "--one-age", *options) == 0
    assert "gradients" not in capsys.readouterr().err
    assert FisherCode.load(out, scope="head").ages == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--table-bits", "12"], "12"),
        (["--text", "short.txt"], "texts hold only 0 sequences of 1024 tokens"),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    """A text that is not there or too short, a width that tables cannot have: exit code 2, no file, no traceback."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short", encoding="utf-8")
    assert run(monkeypatch, model_folder, "--out", "a.safetensors", *options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "Traceback" not in said
    assert not Path("a.safetensors").exists()
