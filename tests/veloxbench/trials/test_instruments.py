"""Another instrument on the same caches: what the committed comparison says, and the comparison itself (slow)."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import ExitCode, IntegrityError
from veloxbench.methods import peers
from veloxbench.trials.instruments import (
    FIGURES,
    OTHER,
    REQUIREMENT,
    disagreements,
    interval_of,
    read_comparison,
)

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "records" / "gate" / "instruments.json"


def agree_within_noise(record: Path) -> None:
    """A paired 99.9% interval (6 comparisons, 3.9 standard errors at 16 sequences) around each difference holds 0."""
    comparison = read_comparison(record)
    for bits, figure in itertools.product(comparison.ours, FIGURES):
        apart = comparison.difference(bits, figure)
        low, high = interval_of(apart)
        assert abs(apart.value) <= (high - low), (bits, figure)


def test_both_instruments_agree_on_the_committed_comparison():
    """KLD, ΔNLL and changed tokens of mlx-lm's 4 and 8 bits; twice a half width is a 99.9% interval of Student's t."""
    agree_within_noise(RECORD)
    comparison = read_comparison(RECORD)
    assert comparison.ours.keys() == {"4", "8"}
    assert comparison.protocol["sequences"] >= 16
    assert np.mean(comparison.theirs["4"]["kld_mean"]) > 10 * np.mean(comparison.theirs["8"]["kld_mean"])


def test_the_page_is_what_the_record_says():
    """docs/instruments.md is generated."""
    page = ROOT / "docs" / "instruments.md"
    assert veloxbench(["trial", "instruments", "--record", str(RECORD), "--check", str(page)]) == 0


def test_a_difference_beyond_its_interval_is_named():
    """Losses ten times as large on one side are a disagreement, and the same on both sides are none."""
    same = read_comparison(RECORD)
    same = same.model_copy(update={"theirs": same.ours})
    assert disagreements(same) == []
    larger = {bits: {name: tuple(10 * x for x in each) for name, each in of.items()} for bits, of in same.ours.items()}
    assert ("4", "kld_mean") in disagreements(same.model_copy(update={"theirs": larger}))


def test_a_damaged_record_is_refused(tmp_path):
    """One sentence, no page."""
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(IntegrityError, match="a comparison of instruments"):
        read_comparison(tmp_path / "x.json")


def test_one_sequence_has_no_interval_and_no_page(tmp_path, capsys):
    """A record that was cut to one sequence is named in a sentence."""
    record = read_comparison(RECORD)
    cut = {bits: {name: each[:1] for name, each in of.items()} for bits, of in record.ours.items()}
    (tmp_path / "x.json").write_text(record.model_copy(update={"ours": cut, "theirs": cut}).model_dump_json())
    assert veloxbench(["trial", "instruments", "--record", str(tmp_path / "x.json")]) == ExitCode.ENVIRONMENT
    assert "needs two sequences" in capsys.readouterr().err


def test_without_the_other_instrument_one_sentence_says_how_to_add_it(tmp_path, monkeypatch, capsys):
    """Its environment is not there."""
    monkeypatch.setattr(peers, "peers_folder", lambda: tmp_path)
    assert veloxbench(["trial", "instruments", "--measure", "--record", str(tmp_path / "x.json")]) == ExitCode.USAGE
    assert "veloxbench peers add" in capsys.readouterr().err


@pytest.mark.slow
def test_both_instruments_agree_measured_anew(tmp_path):
    """16 sequences of 512 tokens of WikiText-2, mlx-quant-fidelity in an environment of its own."""
    if OTHER not in peers.known_peers():
        peers.add(REQUIREMENT)
    assert veloxbench(["trial", "instruments", "--measure", "--record", str(tmp_path / "x.json")]) == 0
    agree_within_noise(tmp_path / "x.json")
