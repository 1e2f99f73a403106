"""The guide's three snippets, kept as examples, on the real default model.

Two calibration sequences stand for the thirty-two of the first, and sixteen generated tokens for mlx-lm's 256: the
time grows with both, and what is said of the result holds for any number.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from veloxbench.inputs.models import resolve_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str) -> dict[str, Any]:
    """Run an example as a script on the default model; its variables afterwards."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    if name == "ratequant.py":
        assert source.count("num_samples=32") == source.count("prompt_cache=cache)") == 1
        source = source.replace("num_samples=32", "num_samples=2")
        source = source.replace("prompt_cache=cache)", "prompt_cache=cache, max_tokens=16)")
    variables: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, str(resolve_model("smollm2-135m").directory)])
        exec(compile(source, name, "exec"), variables)
    return variables


@pytest.fixture(scope="module")
def ratequant() -> dict[str, Any]:
    return run_example("ratequant.py")


def test_first_snippet_allocates_every_layer_below_its_target(ratequant: dict[str, Any]) -> None:
    """30 layers of 1..4 bits and a norm per 64 values: the largest multiple of 1/30 below 2.0 is 1.98333."""
    allocation = ratequant["bit_allocation"]
    assert list(allocation) == [f"layer_{i}" for i in range(30)]
    assert set(allocation.values()) <= {1, 2, 3, 4}
    assert allocation.bits_per_value == Fraction(119, 60)


def test_first_snippet_generates_through_caches_of_that_cost(ratequant: dict[str, Any]) -> None:
    """Each layer's cache holds what the allocation charges for it, and the mean is the allocation's."""
    costs = [cache.bits_per_value() for cache in ratequant["cache"]]
    assert costs == [entry.bits_per_value for entry in ratequant["bit_allocation"].entries]
    assert sum(costs) / 30 == ratequant["bit_allocation"].bits_per_value
    assert ratequant["text"]


def test_first_snippet_measures_the_models_own_vectors(ratequant: dict[str, Any]) -> None:
    """A head's D(b) is the error that encoding and decoding its own kept vectors leaves, recomputed here."""
    import mlx.core as mx
    import numpy as np

    from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE

    entries = {(entry.layer, entry.kind): entry for entry in ratequant["sensitivities"].heads}
    curves = ratequant["curves"].curves
    for curve in (curves[0], curves[len(curves) // 2], curves[-1]):
        vectors = entries[curve.layer, curve.kind].vectors[:, curve.head : curve.head + 1]
        for bits in (2, 4):
            quantizer = TurboQuantMSE(bits)
            decoded = np.array(quantizer.decode(quantizer.encode(vectors), mx.float32), dtype=np.float64)
            error = np.mean((decoded - np.array(vectors.astype(mx.float32), dtype=np.float64)) ** 2)
            # fp32 sums of some 10^5 squares
            measured = curve.distortions[ratequant["curves"].widths.index(bits)]
            assert measured == pytest.approx(error, rel=1e-4)


def test_first_snippet_knows_its_model_and_text(ratequant: dict[str, Any]) -> None:
    """Two sequences of 256 tokens of a 30-layer llama; keys and values apart, three heads each."""
    provenance = ratequant["sensitivities"].provenance
    assert (provenance.num_samples, provenance.seq_len, provenance.n_layers) == (2, 256, 30)
    assert provenance.model_type == "llama"
    assert len(ratequant["curves"].curves) == 30 * 2 * 3


def test_second_snippet_reports_outliers() -> None:
    """Widths scaled to the layers, values at 2 bits, then outlier tokens at 8: both generate, the report is filled."""
    result = run_example("mixed_precision.py")
    assert [f"layer_{i}" for i, b in enumerate(result["bit_allocation"].values()) if b == 4] == [
        f"layer_{i}" for i in range(7, 16)
    ]
    report = result["report"]
    assert 0 < report.outlier_fraction < 0.2
    assert report.mean_outlier_norm > 0
    assert report.outlier_count > 0


def test_third_snippet_climbs_to_its_largest_width() -> None:
    """Cosine 0.95 lies between what 3 and 4 bits give (.92 and .97), so ordinary keys end at 4 bits."""
    result = run_example("adaptive.py")
    rows = result["quantizer"].observer.report().rows
    assert {row.code_bits for row in rows} == {4}
