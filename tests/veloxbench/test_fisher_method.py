"""fisher_klt behind the harness: measured once, fitted once per target, bytes checked, decoded tokens in one suite."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "impl"))

from fisher_inputs import Letters, model_of, prose

from veloxbench.errors import EngagementError
from veloxbench.measure.account import bits_per_value, engagement, static_bytes
from veloxbench.measure.quality import Perplexity
from veloxbench.methods import fisher_klt as method
from veloxbench.methods.registry import BuildContext, build, get_method
from veloxbench.records.arm import Arm
from veloxquant_mlx.allocators.sensitivity import model_sha256
from veloxquant_mlx.cache.base import PackedKVCache
from veloxquant_mlx.calibration.gradients import Split
from veloxquant_mlx.calibration.measure import measure_model

ARM = Arm(name="fisher_klt", target=3.0, parameters={"at_tokens": 300})


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildContext:
    """A tiny model whose calibration takes seconds, and counts how often it is measured."""
    model, calls = model_of("llama"), []

    def small(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        sizes = {"gradient_sequences": 10, "vector_sequences": 18, "split": Split(24, 24, 4)}
        return measure_model(*arguments, **{**options, **sizes})

    monkeypatch.setattr(method, "measure_model", small)
    monkeypatch.setattr(method, "load_text", lambda name, role: SimpleNamespace(joined=prose(3000)))
    made = BuildContext(model, Letters(), model_sha256(model), None, tmp_path)
    object.__setattr__(made, "calls", calls)
    return made


def test_a_model_is_measured_once_and_a_target_fitted_once(context: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Two targets share the measurements; a target that was built before is read from disk, and codes alike."""
    first, claimed = build(context, ARM)
    assert all(claimed)
    build(context, Arm(name="fisher_klt", target=2.0, parameters={"at_tokens": 300}))
    said = capsys.readouterr().err
    again, _ = build(context, ARM)
    assert len(context.calls) == 1
    assert "step" in said
    assert "step" not in capsys.readouterr().err
    assert [c.inner.spec for c in first] == [c.inner.spec for c in again]


def test_bytes_static_bytes_and_engagement(context: Any) -> None:
    """The arrays hold the formula's bytes; tables are counted once for all layers, by hand from the calibration."""
    caches, claimed = build(context, ARM)
    context.model(mx.array(np.random.default_rng(0).integers(97, 123, (1, 200))), cache=caches)
    layers = engagement(caches, claimed, (PackedKVCache,))
    formula = get_method("fisher_klt").formula
    assert [Fraction(layer.used_bytes) for layer in layers] == [formula(c.inner, 200, None) for c in caches]
    assert 2 < bits_per_value(layers) < 8  # a chunk of 200 tokens is young as a whole
    codes = [c.inner.spec.code for c in caches]
    tables = sum(code.transform.nbytes + code.transform.deviations.nbytes for code in codes)
    tables += sum(a.nbytes for code in codes for tier in code.tiers for a in tier.arrays().values())
    tables += sum(a.nbytes for a in codes[0].tiers[0].shared.arrays.values())
    assert static_bytes(caches) == tables
    with pytest.raises(EngagementError, match=r"layer 0 holds \(200, 200\) tokens of keys and values after 199"):
        formula(caches[0].inner, 199, None)


def test_only_the_perplexity_suite_keeps_decoded_tokens(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are built without; the perplexity suite asks for them before it feeds anything, and the record says so."""
    caches, claimed = build(context, ARM)
    assert not any(c.inner.keep_decoded for c in caches)

    class Seen(Exception):
        pass

    def stop(model: Any, arm: Any, *rest: Any) -> None:
        context.model(mx.array([[97, 98, 99, 100, 101, 102]]), cache=list(arm.caches))
        raise Seen(*(layer.attention for layer in engagement(arm.caches, claimed, (PackedKVCache,))))

    monkeypatch.setattr("veloxbench.measure.quality.run_arm", stop)
    monkeypatch.setattr("veloxbench.measure.quality.reference_rows_of", lambda item, bench: iter(()))
    bench = SimpleNamespace(caches=lambda arm: SimpleNamespace(caches=caches), model=context.model, pool=None)
    item = SimpleNamespace(cell=SimpleNamespace(task=None, arm=ARM), block=SimpleNamespace(tokens=np.zeros((1, 2))))
    with pytest.raises(Seen, match="decoded tokens kept beside the coded ones"):
        Perplexity().measure(item, bench, lambda n: None)  # type: ignore[arg-type]
