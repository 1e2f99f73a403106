"""Calibration of the KLT over whole models: what is measured, what the file holds, what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fisher_inputs import Letters, prose
from impl_inputs import tiny_gemma3, tiny_llama
from mlx_lm.models.cache import make_prompt_cache

from veloxquant_mlx.allocators.sensitivity import model_sha256
from veloxquant_mlx.calibration import measure as measure_module
from veloxquant_mlx.calibration.fisher_klt import FisherCode
from veloxquant_mlx.calibration.fitting import fit_code
from veloxquant_mlx.calibration.gradients import Split, fisher_matrices, window_sizes
from veloxquant_mlx.calibration.klt import source_below, text_line_hashes
from veloxquant_mlx.calibration.measure import Measurements, Progress, measure_model
from veloxquant_mlx.calibration.vectors import captured_vectors
from veloxquant_mlx.transforms.klt import joined
from veloxquant_mlx.transforms.rope import probe_ropes

SPLIT = Split(prefix=24, suffix=24, gap=4)
FP32 = 1e-4
"""Relative error of gradients in fp32 against finite differences' own error, and of sums in another order."""


@functools.cache
def llama() -> Any:
    return tiny_llama(head_dim=32)


def measured(model: Any, **options: Any) -> Measurements:
    settings: dict[str, Any] = {
        "gradient_sequences": 10,
        "vector_sequences": 16,
        "split": SPLIT,
        "texts": [prose(2600)],
    }
    return measure_model(model, Letters(), **{**settings, **options})


@functools.cache
def measurements() -> Measurements:
    return measured(llama())


@functools.cache
def calibrated(scope: Any) -> FisherCode:
    return fit_code(measurements(), scope=scope, step=0.01, at_tokens=300)


@pytest.mark.parametrize("scope", ["head", "layer", "below"])
def test_every_layer_gets_a_transform(scope: Any) -> None:
    """Three layers of 128 values a token; with scope below each but the first is predicted from the one beneath."""
    made = calibrated(scope).klt
    assert [layer.layer for layer in made.layers] == [0, 1, 2]
    assert [layer.n_coefficients for layer in made.layers] == [128] * 3
    assert [layer.below for layer in made.layers] == ([None, 0, 1] if scope == "below" else [None] * 3)
    assert made.nbytes == sum(layer.nbytes for layer in made.layers)
    assert made.static_bits_per_value(1000) == 8 * made.nbytes / (1000 * 384)


def test_gradients_are_those_of_later_queries() -> None:
    """∂loss/∂(key) of one old token by central differences, the error put into mlx-lm's own cache behind its rope."""
    model, split = llama(), SPLIT
    ropes = probe_ropes(model)
    ids = np.random.default_rng(3).integers(0, 128, (1, split.tokens)).astype(np.int32)
    exact = fisher_matrices(model, ids, [1], ropes, split=split)[1]

    def loss(row: int, coordinate: int, change: float, labels: mx.array) -> float:
        caches = make_prompt_cache(model)
        model(mx.array(ids[:, : split.prefix]), cache=caches)
        error = np.zeros((1, 2, split.prefix, 32), np.float32)
        side, place = divmod(coordinate, 64)
        error[0, place // 32, row, place % 32] = change
        if side:
            caches[1].values[:, :, : split.prefix] += mx.array(error)
        else:
            caches[1].keys[:, :, : split.prefix] += ropes[1].keys.rotate(mx.array(error))
        logits = model(mx.array(ids[:, split.prefix : -1]), cache=caches)[0].astype(mx.float32)
        terms = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return float(np.array(terms).astype(np.float64).sum())

    caches = make_prompt_cache(model)
    model(mx.array(ids[:, : split.prefix]), cache=caches)
    logits = model(mx.array(ids[:, split.prefix : -1]), cache=caches)[0].astype(mx.float32)
    own, drawn = mx.array(ids[0, split.prefix + 1 :]), mx.random.categorical(logits, key=mx.random.key(0))
    rows = range(4, split.prefix - split.gap)
    for coordinate in (5, 40, 70, 127):
        squares = [
            ((loss(row, coordinate, 0.02, labels) - loss(row, coordinate, -0.02, labels)) / 0.04) ** 2
            for labels in (own, drawn)
            for row in rows
        ]
        assert np.mean(squares) == pytest.approx(exact[coordinate, coordinate], rel=0.02)  # step .02: third derivatives


def test_a_sliding_layer_counts_the_tokens_that_it_still_sees() -> None:
    """With a window of 16 tokens and a prefix of 24, tokens 9 to 19 can be read behind it; full layers: 4 on."""
    model = tiny_gemma3(window=16)
    assert window_sizes(model, range(4)) == {0: 16, 1: 16, 2: None, 3: 16}
    assert [SPLIT.rows(size) for size in (16, None)] == [slice(9, 20), slice(4, 20)]
    ropes = probe_ropes(model)
    ids = np.random.default_rng(0).integers(0, 128, (1, SPLIT.tokens)).astype(np.int32)
    assert all(np.trace(f) > 0 for f in fisher_matrices(model, ids, list(ropes), ropes, split=SPLIT).values())


def test_vectors_are_those_of_the_models_own_cache() -> None:
    """Captured vectors, rotated again, are what mlx-lm's cache holds, the first four tokens left out."""
    model = llama()
    ropes = probe_ropes(model)
    ids = np.random.default_rng(0).integers(0, 128, (2, 20)).astype(np.int32)
    x = captured_vectors(model, ids, [2], ropes)[2]
    assert x.shape == (32, 128)
    caches = make_prompt_cache(model)
    model(mx.array(ids[1:]), cache=caches)
    keys, values = (a[:, :, 4:20] for a in (caches[2].keys, caches[2].values))
    wanted = mx.concatenate([joined(ropes[2].keys.unrotate(keys, 4)), joined(values)], axis=-1)[0]
    assert np.linalg.norm(x[16:] - np.array(wanted)) < FP32 * np.linalg.norm(wanted)


def test_groups_of_layers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one layer at a time: three times the passes, the same gradients and vectors."""
    monkeypatch.setattr(measure_module, "GROUP_NBYTES", 1)
    alone, together = measured(llama()), measurements()
    for layer in together.fishers:
        assert np.linalg.norm(alone.fishers[layer] - together.fishers[layer]) < FP32 * np.linalg.norm(
            together.fishers[layer]
        )
        assert np.array_equal(alone.vectors[layer], together.vectors[layer])


def test_prediction_follows_the_windows() -> None:
    """Full layers are predicted from full ones, sliding ones from any layer that keeps at least as many tokens."""
    windows = {0: 512, 1: 512, 2: None, 3: 1024, 4: 512, 5: None}
    assert {i: source_below(i, windows) for i in windows} == {0: None, 1: 0, 2: None, 3: 2, 4: 3, 5: 2}


def test_a_model_with_sliding_layers_is_calibrated() -> None:
    """gemma3: layer 2 attends to everything and is not predicted from sliding layers; layer 3 is predicted from it."""
    some = measured(tiny_gemma3(window=16), gradient_sequences=4, vector_sequences=8)
    made = fit_code(some, scope="below", step=0.01, at_tokens=100).klt
    assert [layer.below for layer in made.layers] == [None, 0, None, 2]


def test_progress_ends_at_one() -> None:
    """It never falls, names both stages, and expects nothing more at its end."""
    steps: list[Progress] = []
    measured(llama(), on_progress=steps.append)
    shares = [step.done for step in steps]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert steps[-1].seconds_left == pytest.approx(0, abs=1e-6)
    assert {step.stage for step in steps} == {"gradients", "vectors"}


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    """Scope, step, tables, provenance and line hashes come back; the file is checked against the model."""
    path = tmp_path / "a.safetensors"
    made = calibrated("below").save(path).klt
    again = FisherCode.load(path, scope="below").klt
    assert (again.scope, again.step, again.provenance) == (made.scope, made.step, made.provenance)
    assert np.array_equal(again.line_hashes, made.line_hashes)
    x = mx.array(np.random.default_rng(0).standard_normal((1, 6, 128)).astype(np.float32))
    for ours, theirs in zip(again.layers, made.layers, strict=True):
        below = None if ours.below is None else x
        assert mx.array_equal(ours.encode(x, below), theirs.encode(x, below))
    again.provenance.check_model(llama())
    again.provenance.check_model(llama(), sha256=model_sha256(llama()))


def test_another_model_is_refused() -> None:
    """A calibration knows its model by the weights' hash."""
    with pytest.raises(ValueError, match="the calibration is of a llama model with hash"):
        calibrated("head").klt.provenance.check_model(tiny_llama(n_layers=2, head_dim=32))


def test_another_scope_is_refused(tmp_path: Path) -> None:
    """A file of scope head is not one of scope below."""
    path = tmp_path / "a.safetensors"
    calibrated("head").save(path)
    with pytest.raises(ValueError, match="is a calibration of scope 'head', not 'below'"):
        FisherCode.load(path, scope="below")


def test_one_string_is_no_list_of_texts() -> None:
    """A string would be read letter by letter."""
    with pytest.raises(TypeError, match="pass \\[text\\]"):
        measured(llama(), texts=prose(2600))


@pytest.mark.parametrize("place", range(0, 97, 4))
def test_a_damaged_file_is_refused(tmp_path: Path, place: int) -> None:
    """One changed byte, anywhere from the header to the last table: a ValueError, never other figures."""
    path = tmp_path / "a.safetensors"
    calibrated("head").save(path)
    data = bytearray(path.read_bytes())
    data[len(data) * place // 97 + (9 if place == 0 else 0)] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|no calibration|scope|model"):
        FisherCode.load(path).klt.provenance.check_model(llama())


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_a_cut_file_is_refused(tmp_path: Path, kept: int) -> None:
    """Nothing, a part of the header, a part of the tables: one sentence."""
    path = tmp_path / "a.safetensors"
    calibrated("head").save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is damaged or no calibration"):
        FisherCode.load(path)


def test_a_stranger_file_is_refused(tmp_path: Path) -> None:
    """Any other safetensors file is no calibration."""
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"x": mx.zeros(3)})
    with pytest.raises(ValueError, match="is no fisher_klt calibration of this version"):
        FisherCode.load(path)


def test_text_that_was_calibrated_on_is_recognised() -> None:
    """Whole lines of 40 characters or more are known again, in any case and spacing; other text shares none."""
    made = calibrated("head").klt
    lines = prose(2600).splitlines()
    shared = made.shared_lines(
        "\n".join(["some other line that nobody has calibrated on", f"  {lines[3].upper()} ", "short"])
    )
    assert [line.strip().lower() for line in shared] == [lines[3]]
    assert made.shared_lines(prose(3000, seed=9)) == []
    assert text_line_hashes(["short", "x" * 39]).size == 0


def test_a_text_that_is_too_short_is_refused() -> None:
    """Named with what it holds."""
    with pytest.raises(ValueError, match="texts hold only 0 sequences of 48 tokens"):
        measured(llama(), texts=["too short"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "model", "step": 0.01}, "scope must be one of head, layer, below"),
        ({"step": float("nan")}, "step must be finite and above 0"),
        ({"step": 0.01, "epsilon": 0.0}, "epsilon must be finite and above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options: dict[str, Any], words: str) -> None:
    """An unknown scope, a step or regularisation out of range: named."""
    with pytest.raises(ValueError, match=words):
        fit_code(measurements(), **options)


def test_weights_that_are_not_finite_are_refused() -> None:
    """NaN in a layer's value projection is named with the layer, not averaged into tables."""
    model = tiny_llama(head_dim=32)
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[1].self_attn.v_proj.weight * float("nan")
    with pytest.raises(ValueError, match="layer 1 caches values that are not finite"):
        measured(model)


def test_splits_that_leave_nothing_are_refused() -> None:
    """A prefix that the gap and the sinks use up has no vector to differentiate."""
    with pytest.raises(ValueError, match="prefix=68 must exceed gap=64 by more than 4"):
        Split(prefix=68, suffix=10)


@pytest.mark.slow
def test_the_default_model_is_calibrated_to_what_it_promises() -> None:
    """smollm2-135m cut to 3 layers: scope below leaves less to code than layer, and layer less than head, at one step.

    Rate of an ideal code at a step is about Σ log2(deviation/step) over the coefficients above it.
    """
    import mlx_lm
    from mlx_lm.models.llama import Model

    from veloxbench.inputs.corpora import load_text
    from veloxbench.inputs.models import resolve_model

    model, tokenizer = mlx_lm.load(str(resolve_model("smollm2-135m").directory))[:2]
    assert isinstance(model, Model)
    model.model.layers = model.model.layers[:3]
    text = load_text("wikitext-2", "calibration").joined
    some = measure_model(model, tokenizer, [text], gradient_sequences=3, vector_sequences=6)
    rates = {}
    for scope in ("head", "layer", "below"):
        made = fit_code(some, scope=scope, step=0.0075, bits=8).klt
        deviations = np.concatenate([np.array(layer.deviations) for layer in made.layers])
        rates[scope] = np.log2(np.maximum(deviations / made.step, 1)).mean()
    assert rates["below"] < rates["layer"] < rates["head"]
