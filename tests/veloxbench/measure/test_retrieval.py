"""The retrieval suite: what its tasks ask, which positions count, and that coarse codes find less."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import UsageError
from veloxbench.measure.retrieval import ByDepth, Needles, Repeated, _estimates
from veloxbench.records.store import read_records


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text: str, **options: object) -> list[int]:
        return [ord(c) for c in text]


def block(sequences: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(200, 900, (sequences, length + 1)).astype(np.int32)


def test_a_repeated_sequence_can_be_copied_from_half_the_length_back() -> None:
    """Every scored target is the token that followed the same token the first time."""
    task = Repeated(3, 32)
    text = block(3, 32)
    laid = task.laid(text, Letters())
    assert laid.tokens.shape == (3, 33)
    assert laid.score_from == 16
    targets = laid.tokens[:, laid.score_from + 1 :]
    assert (targets == laid.tokens[:, 1:17]).all()
    assert laid.marks["copied"].all()
    assert (np.sort(laid.tokens[:, :16]) == np.sort(text[:, :16])).all()
    assert (laid.tokens[:, :16] != text[:, :16]).any()


def test_needles_are_asked_for_in_the_words_in_which_they_were_told() -> None:
    """The tokens that count at a depth are the digits of the number that was told there, and nothing else counts."""
    task = Needles(2, 900, (0.1, 0.5, 0.8))
    text = block(2, 900)
    laid = task.laid(text, Letters())
    for row in range(2):
        for depth in task.depths:
            told = "".join(map(chr, laid.tokens[row, int(depth * 900) :][:60]))
            name, number = told.split(" is ")[0].split()[-1], told.split(" is ")[1].split(".")[0]
            counted = np.flatnonzero(laid.marks[f"at_{depth:g}"][row]) + laid.score_from + 1  # targets
            assert "".join(map(chr, laid.tokens[row, counted])) == f" {number}"
            before = "".join(map(chr, laid.tokens[row, counted[0] - 30 : counted[0]]))
            assert before.endswith(f"The secret number of {name} is")
        told_tokens = (laid.tokens[row] < 200).sum()
        assert (laid.tokens[row] == text[row]).sum() >= 901 - told_tokens
    assert len({tuple(row) for row in laid.tokens[:, -120:]}) == 2  # rows have facts of their own


def test_parts_by_depth_cover_every_scored_position_once() -> None:
    """Four parts of 512 tokens, the first chunk read and not scored."""
    laid = ByDepth(2, 512).laid(block(2, 512), Letters())
    assert list(laid.marks) == ["to_128", "to_256", "to_384", "to_512"]
    assert (sum(mark.astype(int) for mark in laid.marks.values()) == 1).all()
    assert [int(mark[0].sum()) for mark in laid.marks.values()] == [64, 128, 128, 128]


def test_only_positions_that_count_enter_a_mean() -> None:
    """Two sequences with one marked position each at either depth: means by hand."""
    marks = {"at_0.1": np.array([[1, 0, 0], [0, 1, 0]], bool), "at_0.9": np.array([[0, 1, 0], [1, 0, 0]], bool)}
    made = _estimates(marks, {"kld_mean": np.array([[1.0, 3.0, 100.0], [5.0, 2.0, 100.0]])}, "nats/token")
    assert {name: estimate.value for name, estimate in made.metrics.items()} == {
        "kld_mean": (2.0 + 3.5) / 2,
        "kld_mean_at_0.1": 1.5,
        "kld_mean_at_0.9": 4.0,
    }
    assert made.samples["kld_mean"] == [2.0, 3.5]


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (lambda: Repeated(4, 33), "must be even"),
        (lambda: Repeated(0, 32), "sequences is 0"),
        (lambda: Needles(1, 900, (0.5, 0.2)), "rise"),
        (lambda: Needles(1, 900, (0.5, float("nan"))), "rise"),
        (lambda: ByDepth(1, 512, 0), "parts is 0"),
        (lambda: Needles(1, 900, (0.1, 0.11)).laid(block(1, 900), Letters()), "no room between the facts"),
        (lambda: Needles(1, 900, (0.1, 0.95)).laid(block(1, 900), Letters()), "no room for the questions"),
    ],
)
def test_a_task_that_cannot_be_laid_out_is_refused(task: object, says: str) -> None:
    """With the argument, its value and the rule."""
    with pytest.raises(UsageError, match=says):
        task()  # type: ignore[operator]


def test_a_coarse_code_copies_less_faithfully_than_a_fine_one(cut_model: Path, tmp_path: Path) -> None:
    """Through run and report: fp16 has a row, and at 2 bits the divergence at copied tokens exceeds that at 8 bits."""
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f"summary = 'copies'\nmodels = [{json.dumps(str(cut_model))}]\ncorpus = 'wikitext-2'\nsuites = ['retrieval']\n"
        "[[arms]]\nmethod = 'turboquant_mse'\ntargets = [8, 2]\n"
        "[[retrieval]]\nname = 'repeated'\nsequences = 2\nlength = 96\n"
    )
    out = tmp_path / "out"
    assert veloxbench(["run", "--profile", str(grid), "--out", str(out)]) == 0
    records = {record.subject.method.label: record for record in read_records(out)}
    fine, coarse = (records[f"turboquant_mse@{bits}"].metrics["kld_mean"].value for bits in (8, 2))
    assert 0 < fine < coarse / 100  # distortion falls fourfold a bit: 4096 times between them
    assert records["turboquant_mse@2"].metrics["bits_per_value"].value == pytest.approx(2.25)
    assert "recalled" in records["fp16"].metrics
    assert "### Retrieval, repeated" in (out / "BENCHMARK_RESULTS.md").read_text(encoding="utf-8")
