"""Travelled baselines: what the trial draws, and the page that its record gives."""

from pathlib import Path

import numpy as np
import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxbench.errors import ExitCode, IntegrityError
from veloxbench.gate.verdicts import Verdict
from veloxbench.trials.damages import read_study
from veloxbench.trials.travelling import LOSSES, STRUCK, error_rates, read_rates

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "records" / "gate" / "travelling.json"


def test_settings_that_round_alike_are_never_wrong():
    """Both sides' samples are the same: every equal gate passes, and a loss 2.6 times as large never does."""
    settings = read_rates(RECORD).settings
    alike = next(iter(settings.samples.values()))
    settings = settings.model_copy(update={"samples": {"one": alike, "other": alike}})
    rates = error_rates(settings, read_study(ROOT / "records" / "gate" / "damages.json"), gates=4, seed=0)
    ends = {one.what: one for one in rates.drawn}
    assert set(rates.measured_gates.values()) == {Verdict.PASS}
    assert ends["nothing"].passed.count == 4
    assert ends[f"loss {LOSSES[-1]:.0%} larger"].regress.count == 4
    assert {one.regress.count + one.passed.count + one.inconclusive.count for one in rates.drawn} == {4}


def test_the_committed_settings_differ_by_rounding_alone():
    """The fp16 reference moved by less than a tenth of its margin of 10^-3 nats, and the struck arm drew noise anew."""
    one, other = read_rates(RECORD).settings.samples.values()
    assert one.keys() == other.keys()
    assert abs(np.mean(one["fp16"]["nll"]) - np.mean(other["fp16"]["nll"])) < 1e-4
    assert np.std(np.subtract(one[STRUCK]["kld_mean"], other[STRUCK]["kld_mean"])) > 0


def test_the_page_is_what_the_record_says():
    """docs/travelling.md is generated."""
    page = ROOT / "docs" / "travelling.md"
    assert veloxbench(["trial", "travelling", "--record", str(RECORD), "--check", str(page)]) == 0


@pytest.mark.parametrize("measured", [["AVX2"], ["AVX2=a"], ["=a", "x=b"]])
def test_settings_are_given_with_their_folders(measured, capsys):
    """One setting has nothing to be compared with, and a setting needs a folder."""
    options = [word for each in measured for word in ("--measured", each)]
    assert veloxbench(["trial", "travelling", *options]) == ExitCode.USAGE
    assert "--measured" in capsys.readouterr().err


def test_a_damaged_record_is_refused(tmp_path):
    """One sentence, no page."""
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(IntegrityError, match="a record of travelled baselines"):
        read_rates(tmp_path / "x.json")
