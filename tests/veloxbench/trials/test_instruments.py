"""Other instruments on the same caches: what the committed comparison says, and the comparison itself (slow)."""

from pathlib import Path

import numpy as np
import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import ExitCode, IntegrityError, UnfitEnvironmentError
from veloxbench.methods import peers
from veloxbench.trials.instruments import (
    FIGURES,
    INSTRUMENTS,
    Other,
    _theirs,
    disagreements,
    interval_of,
    read_comparison,
)

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "records" / "gate" / "instruments.json"


MEASURED = {
    *(("mlx-quant-fidelity", bits, figure) for bits in ("4", "8") for figure in FIGURES),
    *(("refract-llm", bits, "kld_mean") for bits in ("4", "8")),
}


def agree_within_noise(comparison):
    """A paired 99.9% interval (8 comparisons, 3.9 standard errors at 16 sequences) around each difference holds 0."""
    for pair in comparison.pairs():
        low, high = interval_of(pair.apart)
        assert abs(pair.apart.value) <= (high - low), (pair.other, pair.bits, pair.figure)
    return {(pair.other, pair.bits, pair.figure) for pair in comparison.pairs()}


def test_all_instruments_agree_on_the_committed_comparison():
    """KLD (and ΔNLL and changed tokens) at 4 and 8 bits; twice a half width is a 99.9% interval of Student's t."""
    comparison = read_comparison(RECORD)
    assert agree_within_noise(comparison) >= {one for one in MEASURED if one[0] == "mlx-quant-fidelity"}
    assert comparison.protocol["sequences"] >= 16
    assert np.mean(comparison.ours["4"]["kld_mean"]) > 10 * np.mean(comparison.ours["8"]["kld_mean"])


def test_the_page_is_what_the_record_says():
    """docs/instruments.md is generated."""
    page = ROOT / "docs" / "instruments.md"
    assert veloxbench(["trial", "instruments", "--record", str(RECORD), "--check", str(page)]) == 0


def with_theirs(figures):
    """The committed comparison, where both other instruments have said that."""
    others = {name: Other(versions={name: version}, figures=figures) for name, version in INSTRUMENTS.items()}
    return read_comparison(RECORD).model_copy(update={"others": others})


def test_a_difference_beyond_its_interval_is_named():
    """Losses ten times as large on one side are a disagreement, and the same on both sides are none."""
    ours = read_comparison(RECORD).ours
    assert disagreements(list(with_theirs(ours).pairs())) == []
    larger = {bits: {name: tuple(10 * x for x in each) for name, each in of.items()} for bits, of in ours.items()}
    named = {(pair.other, pair.bits, pair.figure) for pair in disagreements(list(with_theirs(larger).pairs()))}
    assert named >= {(name, bits, "kld_mean") for name in INSTRUMENTS for bits in ("4", "8")}


def test_a_damaged_record_is_refused(tmp_path):
    """One sentence, no page."""
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(IntegrityError, match="a comparison of instruments"):
        read_comparison(tmp_path / "x.json")


def first(n, figures):
    """Figures of the first n sequences."""
    return {bits: {name: each[:n] for name, each in of.items()} for bits, of in figures.items()}


def test_one_sequence_has_no_interval_and_no_page(tmp_path, capsys):
    """A record that was cut to one sequence is named in a sentence."""
    ours = first(1, read_comparison(RECORD).ours)
    (tmp_path / "x.json").write_text(with_theirs(ours).model_copy(update={"ours": ours}).model_dump_json())
    assert veloxbench(["trial", "instruments", "--record", str(tmp_path / "x.json")]) == ExitCode.ENVIRONMENT
    assert "needs two sequences" in capsys.readouterr().err


def test_sequences_that_are_not_paired_are_refused(tmp_path):
    """Fifteen figures of theirs beside sixteen of ours would be paired with the wrong ones."""
    (tmp_path / "x.json").write_text(with_theirs(first(15, read_comparison(RECORD).ours)).model_dump_json())
    with pytest.raises(IntegrityError, match=r"15 sequences of kld_mean at 4 bits by mlx-quant-fidelity, and 16"):
        read_comparison(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("says", "error"),
    [
        ("exit 3", (UnfitEnvironmentError, "mlx-quant-fidelity ended with 3")),
        ("true", (IntegrityError, "is not an instrument's answer")),
        ("echo '[1, 2]'", (IntegrityError, "is not an instrument's answer")),
        (
            """echo '{"versions": {}, "figures": {"4": {"kld_mean": [NaN]}}}'""",
            (IntegrityError, r"figures\.4\.kld_mean\.0"),
        ),
    ],
)
def test_an_instrument_that_gives_no_figures_is_named(says, error, tmp_path, monkeypatch):
    """It ends with a code, says nothing, says something else, says a figure that is not finite."""
    monkeypatch.setattr(peers, "peers_folder", lambda: tmp_path)
    peer = peers.Peer(name="mlx-quant-fidelity", version="0", requirement="", memory_gib=1.0)
    peer.python.parent.mkdir(parents=True)
    peer.python.write_text(f"#!/bin/sh\ncat > /dev/null\n{says}\n")
    peer.python.chmod(0o755)
    with pytest.raises(error[0], match=error[1]):
        _theirs(peer, tmp_path, np.zeros((1, 2), np.int32))


def test_without_another_instrument_one_sentence_says_how_to_add_it(tmp_path, monkeypatch, capsys):
    """Its environment is not there."""
    monkeypatch.setattr(peers, "peers_folder", lambda: tmp_path)
    assert veloxbench(["trial", "instruments", "--measure", "--record", str(tmp_path / "x.json")]) == ExitCode.USAGE
    assert "veloxbench peers add" in capsys.readouterr().err


@pytest.mark.slow
def test_all_instruments_agree_measured_anew(tmp_path):
    """16 sequences of 512 tokens of WikiText-2, each other program in an environment of its own."""
    for name, version in INSTRUMENTS.items():
        if name not in peers.known_peers():
            peers.add(f"{name}=={version}")
    assert veloxbench(["trial", "instruments", "--measure", "--record", str(tmp_path / "x.json")]) == 0
    assert agree_within_noise(read_comparison(tmp_path / "x.json")) == MEASURED
