"""The damages do what they say and nothing else, and a study that was stopped goes on."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from veloxbench.cli.app import _run
from veloxbench.errors import ExitCode
from veloxbench.gate.verdicts import Verdict
from veloxbench.inputs.models import resolve_model
from veloxbench.inputs.transfer_progress import SilentReporter
from veloxbench.measure.protocol import Chunked
from veloxbench.trials import damages
from veloxbench.trials.damaged import (
    BASES,
    CENTROID,
    DAMAGES,
    MIDDLE,
    LateTokens,
    ScaledHead,
    ShiftedCentroid,
    Unrotated,
    strikes,
    undamaged,
)
from veloxbench.trials.damages import GATES, Study, exact_changes, measure, reaches, trials
from veloxbench.trials.damages_page import render
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

ROOT = Path(__file__).parents[3]
ONE_ULP = 2.0**-21  # fp32 products and sums of 64 terms, relative to the largest value


def vectors() -> mx.array:
    """``[1, 3, 40, 64]`` Gaussian vectors, fp16."""
    return mx.array(np.random.default_rng(0).standard_normal((1, 3, 40, 64)).astype(np.float16))


def decoded(quantizer: TurboQuantMSE) -> np.ndarray:
    """The vectors after one round trip, in fp32."""
    return np.array(quantizer.decode(quantizer.encode(vectors()), mx.float32))


def test_a_shifted_centroid_moves_what_has_its_code_and_nothing_else():
    """Codes stay; in rotated coordinates exactly the values of one code grow, by the share."""
    plain, shifted = TurboQuantMSE(4), ShiftedCentroid(4, share=0.05)
    one, other = plain.encode(vectors()), shifted.encode(vectors())
    assert np.array_equal(np.array(one.arrays[0]), np.array(other.arrays[0]))
    levels, wrong = plain.codebook(64).centroids, shifted.codebook(64).centroids
    assert np.flatnonzero(levels != wrong).tolist() == [CENTROID]
    assert wrong[CENTROID] == pytest.approx(1.05 * levels[CENTROID], rel=1e-12)


def test_without_rotation_each_coordinate_is_coded_by_itself():
    """The nearest of the 16 centroids to each coordinate over the vector's root mean square, computed in NumPy."""
    x = np.array(vectors()).astype(np.float64)
    rms = np.sqrt((x**2).mean(axis=-1, keepdims=True))
    levels = TurboQuantMSE(4).codebook(64).centroids
    nearest = levels[np.abs(x[..., None] / rms[..., None] - levels).argmin(axis=-1)]
    found = decoded(Unrotated(4))
    assert np.abs(found - nearest * rms.astype(np.float16)).max() <= 4 * ONE_ULP * np.abs(found).max()


def test_a_wrong_scale_lengthens_the_first_head_alone():
    """20% longer there, unchanged elsewhere."""
    plain, scaled = decoded(TurboQuantMSE(4)), decoded(ScaledHead(4, share=0.2))
    assert np.allclose(scaled[:, 0], 1.2 * plain[:, 0], rtol=1e-6, atol=0)
    assert np.array_equal(scaled[:, 1:], plain[:, 1:])


def test_late_tokens_are_the_same_tokens_one_place_later():
    """The last comes first."""
    assert np.array_equal(decoded(LateTokens(4)), np.roll(decoded(TurboQuantMSE(4)), 1, axis=2))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_each_damage_changes_some_layer_and_names_are_unique(damage):
    """No damage of the table is the base itself."""
    changed = [layer for layer in range(30) if strikes(damage, layer)]
    assert changed in ([0], [MIDDLE], list(range(10)), list(range(30))) or damage.change is undamaged
    assert [other.name for other in DAMAGES].count(damage.name) == 1
    assert damage.name not in BASES


@pytest.fixture(scope="module")
def study(tmp_path_factory, cut_model):
    """A study of two damages on 24 tokens a sequence, stopped after its first parts and taken up again."""
    place = tmp_path_factory.mktemp("study")
    chosen = tuple(damage for damage in DAMAGES if damage.name in ("3 bits, layer 0", "no rotation"))
    protocol = Chunked(16, 16, 8, 8)
    calls = []
    real = damages._samples

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damages, "DAMAGES", chosen)
        patch.setattr(damages, "_samples", counted)
        handle = resolve_model(str(cut_model))
        journal = place / "study.part"
        with pytest.raises(KeyboardInterrupt):
            measure(handle, "bundled", protocol, journal, SilentReporter())
        kept = len(journal.read_text().splitlines()) - 1
        found = measure(handle, "bundled", protocol, journal, SilentReporter())
        assert (kept, len(calls)) == (5, 1 + GATES * (len(BASES) + len(chosen)))
        judged = trials(found, 4)
        page = render(found, judged, reaches(found, judged, 4), 4)
        return Study.model_validate_json(found.model_dump_json()), judged, page


def test_a_stopped_study_goes_on_and_measures_damage(study):
    """A layer with a bit less, and no rotation, both cost KLD; both change what the exact suite sees."""
    found, judged, _ = study
    assert {len(hands) for hands in found.samples.values()} == {GATES}
    for trial in judged:
        assert trial.true.value > 0
        assert trial.exact
    narrower = judged[0]
    assert "bits_per_value" in narrower.exact


def test_a_page_names_every_damage(study):
    """One row each, and what follows."""
    _, judged, page = study
    for trial in judged:
        assert f"| {trial.damage.summary}" in page
    assert "## What follows" in page


def test_an_unchanged_arm_passes_every_gate(study):
    """The base judged as if it were a damage: no sequence differs."""
    found, _, _ = study
    base = found.samples["plain"]
    findings = damages._judged(found, "plain", base[0], base[0], 4)
    assert {finding.verdict for finding in findings} == {Verdict.PASS}
    assert undamaged(BASES["plain"].layer_spec(0, None, None, None)) == BASES["plain"].layer_spec(0, None, None, None)


def test_the_page_and_the_plot_are_what_the_study_says(tmp_path, capsys):
    """docs/damages.md and .svg are generated from records/gate/damages.json; either one edited by hand is stale."""
    study, page = ROOT / "records" / "gate" / "damages.json", tmp_path / "damages.md"
    command = ["trial", "damages", "--study", str(study), "--check"]
    assert _run([*command, str(ROOT / "docs" / "damages.md")]) == ExitCode.PASS
    for name in ("damages.md", "damages.svg"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    (tmp_path / "damages.svg").write_text((tmp_path / "damages.svg").read_text().replace("share", "part", 1))
    assert _run([*command, str(page)]) == ExitCode.REGRESSION
    assert f"{tmp_path / 'damages.svg'} is stale" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["centroid 1%", "no sinks"])
def test_the_exact_suite_sees_the_smallest_damage(name):
    """One centroid of 16 off by 1% is a change of decoded values; a sink less is one of bytes too."""
    study = Study.model_validate_json((ROOT / "records" / "gate" / "damages.json").read_text())
    changed = exact_changes(study, next(damage for damage in DAMAGES if damage.name == name))
    assert "fed_keys" in changed
    assert ("fed_bits_per_value" in changed) == (name == "no sinks")
