"""The Fisher-weighted KLT: what its coordinates are, what its tables hold, what rounding them costs."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gaussian

from veloxquant_mlx.calibration.fit import FittedLayer, fit_layer, regularised
from veloxquant_mlx.codes.deadzone import DeadZone
from veloxquant_mlx.transforms.coded_matrix import CodedMatrix, code_matrix
from veloxquant_mlx.transforms.klt import CachedShape, Scope, cached_vectors, keys_and_values
from veloxquant_mlx.transforms.rope import LayerRopes, Rope

FP16_ENTRIES = 2e-3
"""Relative error of a product of two matrices of fp16 entries (2^-11 each), conditioned a few times worse."""

SHAPES = {
    "GQA": CachedShape(2, 48, 2, 48),
    "MQA, wide": CachedShape(1, 256, 1, 256),
    "MHA": CachedShape(3, 64, 3, 64),
    "latent": CachedShape(1, 40, 1, 16),
}


def ropes(shape: CachedShape) -> LayerRopes:
    turns = tuple(float(np.float32(1e4 ** (-i / 16))) for i in range(16))
    return LayerRopes(Rope(shape.key_dim, 0, 32, False, turns), Rope(shape.value_dim))


@functools.cache
def sample(shape: CachedShape, n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A Fisher matrix with eigenvalues over three decades, and correlated vectors with a mean."""
    rng = np.random.default_rng(seed)
    size = shape.size

    def spread(decades: float) -> np.ndarray:
        q, _ = np.linalg.qr(rng.standard_normal((size, size)))
        return (q * 10 ** (-decades * np.arange(size) / size)) @ q.T

    x = rng.standard_normal((n, size)) @ spread(1.5) * 4 + rng.standard_normal(size)
    return 1e-4 * spread(3.0), x.astype(np.float32)


@functools.cache
def fitted(shape: CachedShape, scope: Scope, bits: int = 16, step: float = 0.01) -> FittedLayer:
    fisher, x = sample(shape)
    return fit_layer(3, shape, ropes(shape), fisher, x, scope=scope, step=step, bits=bits)


@pytest.mark.parametrize("scope", ["head", "layer", "below"])
@pytest.mark.parametrize("name", SHAPES)
def test_decoding_undoes_encoding(name: str, scope: Scope) -> None:
    """Unquantized coefficients give the vectors back to the precision of fp16 tables; keys are rotated again."""
    shape = SHAPES[name]
    transform = fitted(shape, scope).transform
    keys = mx.array(gaussian((2, shape.n_kv_heads, 5, shape.key_dim)))
    values = mx.array(gaussian((2, shape.n_value_heads, 5, shape.value_dim), 1))
    x = transform.vectors(keys, values, 700)
    y = transform.encode(x)
    assert y.shape == (2, 5, shape.size)
    back = transform.keys_and_values(transform.decode(y), 700)
    for got, wanted in zip(back, (keys, values), strict=True):
        assert (mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted)).item() < FP16_ENTRIES


def test_vectors_of_a_token_are_its_heads_keys_then_values() -> None:
    """Without rope the vector of a token is k0 k1 v0 v1, and parting it gives the arrays back."""
    shape = CachedShape(2, 3, 2, 2)
    keys, values = mx.arange(12).reshape(1, 2, 2, 3), 100 + mx.arange(8).reshape(1, 2, 2, 2)
    plain = LayerRopes(Rope(3), Rope(2))
    x = cached_vectors(keys, values, plain)
    assert x[0, 1].tolist() == [3, 4, 5, 9, 10, 11, 102, 103, 106, 107]
    for got, wanted in zip(keys_and_values(x, shape, plain), (keys, values), strict=True):
        assert mx.array_equal(got, wanted)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_errors_of_coefficients_cost_alike(scope: Scope) -> None:
    """An error e of the decoded vector costs e F eᵀ, with F regularised: white noise of variance 1 on n coefficients
    costs n, each 1 (Parseval in the metric); within a head where heads have their own transform.
    """
    shape = SHAPES["GQA"]
    fisher, _ = sample(shape)
    transform = fitted(shape, scope).transform
    basis = np.array(transform.decode(mx.eye(shape.size)[None])[0], dtype=np.float64)
    costs = np.zeros(shape.size)
    for start, stop in shape.parts(scope):
        part = basis[:, start:stop]
        costs += np.einsum("ij,jk,ik->i", part, regularised(fisher[start:stop, start:stop], 0.1), part)
    assert np.allclose(costs, 1, atol=FP16_ENTRIES)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_coefficients_are_uncorrelated_and_fall(scope: Scope) -> None:
    """Over the calibration vectors a block's coefficients are uncorrelated; all come in order of falling deviation."""
    shape = SHAPES["GQA"]
    made = fitted(shape, scope)
    deviations = np.array(made.transform.deviations)
    assert np.all(np.diff(deviations) <= 1e-3 * deviations[:-1])  # fp16 encoders: neighbours may change places
    assert np.allclose(np.square(made.coefficients).mean(0), deviations**2, rtol=1e-4)
    if scope == "layer":
        correlations = np.corrcoef(made.coefficients.T) - np.eye(shape.size)
        assert np.abs(correlations).max() < 0.02  # fp16 rounding of encoders under 60-fold spread of deviations


def test_the_best_basis_has_the_least_geometric_mean() -> None:
    """A joint transform of a layer leaves a smaller product of deviations than its heads' own (Hadamard)."""
    shape = SHAPES["GQA"]
    logs = [np.log(np.array(fitted(shape, scope).transform.deviations)).sum() for scope in ("head", "layer")]
    # The determinant of the metric differs between scopes (a block-diagonal one has a larger determinant, Fischer):
    # compare what is left per nat of it.
    fisher, _ = sample(shape)
    metrics = [
        sum(np.linalg.slogdet(regularised(fisher[a:b, a:b], 0.1))[1] for a, b in shape.parts(scope)) / 2
        for scope in ("head", "layer")
    ]
    assert logs[1] - metrics[1] < logs[0] - metrics[0] - 1


@functools.cache
def predicted_pair(bits: int = 16) -> tuple[FittedLayer, FittedLayer, np.ndarray]:
    """A layer of 80 values and one of 192 above it, which is a linear map of it and a tenth of noise."""
    low, high = CachedShape(1, 40, 1, 40), SHAPES["GQA"]
    fisher, x = sample(low)
    rng = np.random.default_rng(5)
    above = x @ rng.standard_normal((low.size, high.size)) / 9 + 0.1 * rng.standard_normal((len(x), high.size))
    first = fit_layer(0, low, ropes(low), fisher, x, scope="below", step=0.002, bits=bits)
    second = fit_layer(
        1,
        high,
        ropes(high),
        sample(high)[0],
        above.astype(np.float32),
        scope="below",
        step=0.002,
        below=(0, first.decoded),
        bits=bits,
    )
    return first, second, above.astype(np.float32)


def test_a_layer_is_predicted_from_the_decoded_one_below() -> None:
    """What is left to code is the noise and the lower layer's error: far less than without the forecast."""
    first, second, above = predicted_pair()
    alone = fit_layer(
        1, SHAPES["GQA"], ropes(SHAPES["GQA"]), sample(SHAPES["GQA"])[0], above, scope="layer", step=0.002
    )
    assert second.transform.below == 0
    assert np.square(second.coefficients).sum() < 0.1 * np.square(alone.coefficients).sum()
    lower = mx.array(first.decoded)[None]
    y = second.transform.encode(mx.array(above)[None], lower)
    assert np.allclose(np.array(y[0]), second.coefficients, atol=1e-4)
    back = second.transform.decode(y, lower) + second.transform.mean
    assert np.linalg.norm(np.array(back[0]) - above) < FP16_ENTRIES * np.linalg.norm(above)


def test_a_predicted_layer_needs_the_layer_below() -> None:
    """Coding without the decoded vector below, or with one that nothing asked for, is an error naming the layer."""
    first, second, above = predicted_pair()
    with pytest.raises(ValueError, match="layer 1 is predicted from the decoded vector of layer 0"):
        second.transform.encode(mx.array(above)[None])
    with pytest.raises(ValueError, match="layer 0 is predicted from no decoded vector"):
        first.transform.decode(mx.zeros((1, 1, 80)), mx.zeros((1, 1, 80)))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_static_bytes_are_those_of_the_arrays(scope: Scope, bits: int) -> None:
    """2 N² entries of b bits (head: of each head's D²), a bf16 scale a row, an fp32 mean; fp16 entries at 16 bits."""
    shape = SHAPES["MHA"]
    transform = fitted(shape, scope, bits).transform
    widths = [b - a for a, b in shape.parts(scope)]
    expected = sum(2 * w * (w * bits // 8 + 2) for w in widths) + 4 * shape.size
    expected += 2 * shape.size if scope == "head" else 0
    assert transform.nbytes == expected
    held = {name: a for name, a in transform.arrays().items() if name != "deviations"}
    assert transform.nbytes == sum(a.nbytes for a in held.values())


@pytest.mark.parametrize(("bits", "limit"), [(8, 1.02), (6, 1.1), (4, 2.2)])
def test_rounded_tables_cost_little_at_the_operating_step(bits: int, limit: float) -> None:
    """Error in the metric of quantized coefficients, against fp16 tables: the decoder is fitted to the encoder."""
    shape = SHAPES["GQA"]
    fisher, x = sample(shape)
    metric = regularised(fisher, 0.1)

    def cost(bits: int) -> float:
        made = fitted(shape, "layer", bits, step=0.02)
        error = made.decoded + np.array(made.transform.mean) - x
        return float(np.einsum("ij,jk,ik->", error, metric, error))

    assert cost(bits) < limit * cost(16)


def test_a_transform_survives_its_arrays() -> None:
    """Arrays and a JSON description give the same transform back, rope and predictor included."""
    _, second, above = predicted_pair(5)
    transform = second.transform
    again = type(transform).from_arrays(transform.arrays(), json.loads(json.dumps(transform.description())))
    lower = mx.array(gaussian((1, 4, 80)))
    x = mx.array(above[:4])[None]
    assert mx.array_equal(again.encode(x, lower), transform.encode(x, lower))
    assert again.ropes == transform.ropes
    assert again.nbytes == transform.nbytes


def test_inconsistent_parts_are_refused() -> None:
    """A mean of another width, a predictor without its layer: errors that name them."""
    transform = fitted(SHAPES["GQA"], "layer").transform
    with pytest.raises(ValueError, match=r"mean must be \[192\]"):
        replace(transform, mean=mx.zeros(5))
    with pytest.raises(ValueError, match="below and predictor go together"):
        replace(transform, below=2)
    with pytest.raises(ValueError, match="layer 3 was calibrated for CachedShape"):
        transform.vectors(mx.zeros((1, 3, 2, 48)), mx.zeros((1, 3, 2, 48)))


def test_vectors_and_matrices_that_do_not_fit_are_refused() -> None:
    """NaN, a Fisher matrix of zeros and sizes that disagree name the layer."""
    shape = SHAPES["GQA"]
    fisher, x = sample(shape, 300)

    def fit(fisher: np.ndarray, x: np.ndarray) -> None:
        fit_layer(7, shape, ropes(shape), fisher, x, scope="layer", step=0.01)

    for bad, sample_, words in (
        (fisher * np.nan, x, "Fisher matrix must be finite"),
        (fisher * 0, x, "not all zero"),
        (fisher, np.where(x > 3, np.nan, x), "vectors must be finite"),
        (fisher[:5, :5], x, "192 values a token"),
    ):
        with pytest.raises(ValueError, match=f"layer 7.*{words}"):
            fit(bad, sample_)


def test_a_dead_zone_and_centroids_of_a_laplacian() -> None:
    """A Laplacian at step 1: below .6 all is zero, and a bin decodes to its mean, below its middle."""
    y = np.random.default_rng(0).laplace(size=(4000, 8)).astype(np.float32)
    zone = DeadZone.fit(y, 1.0)
    q = zone.values(zone.quantize(y))
    assert np.all(q[np.abs(y) < 0.599] == 0)
    first = (np.abs(y) >= 0.6) & (np.abs(y) < 1.6)
    # E[|y| | .6 <= |y| < 1.6] of a Laplacian = .6 + 1 − 1/(e − 1) = 1.0180
    assert np.allclose(np.abs(q[first]), 1.0180, atol=0.01)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1188), (4, 0.01154), (8, 1e-4)])
def test_rows_are_rounded_as_a_uniform_quantizer_can(bits: int, expected: float) -> None:
    """Gaussian rows lose what the best uniform quantizer loses (Max 1960: .1188 at 2 bits, .01154 at 4), within 20%:
    its clip is picked from a few; at 8 bits less than 1e-4.
    """
    matrix = gaussian((64, 512)).astype(np.float64)
    error = np.square(np.array(code_matrix(matrix, bits).dense()) - matrix).mean()
    assert error < 1.2 * expected
    assert error > 0.9 * expected or bits == 8


def test_a_metric_steers_rounding() -> None:
    """Shaped noise costs at best the geometric over the arithmetic mean of the metric's eigenvalues, .1/.215 = .465
    for two decades; three bits, whose range is bounded, come within a third of that.
    """
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((96, 96)))
    metric = (q * np.logspace(0, -2, 96)) @ q.T
    matrix = rng.standard_normal((32, 96))
    costs = []
    for given in (None, metric):
        e = np.array(code_matrix(matrix, 3, given).dense()) - matrix
        costs.append(np.einsum("ij,jk,ik->", e, metric, e))
    assert 0.465 < costs[1] / costs[0] < 0.62


@pytest.mark.parametrize("bits", [1, 9, 12, True])
def test_other_widths_are_refused(bits: int) -> None:
    """2..8 or 16, named."""
    with pytest.raises(ValueError, match=r"must be within 2\.\.8, or 16"):
        code_matrix(np.eye(4), bits)


def test_coded_rows_of_another_shape_are_refused() -> None:
    """Words that do not fit the columns, and matrices that are not finite, are errors."""
    with pytest.raises(ValueError, match=r"rows must be .* \(3, 2\)"):
        CodedMatrix(mx.zeros((3, 1), mx.uint32), mx.zeros(3, mx.bfloat16), 8, 8)
    with pytest.raises(ValueError, match="matrix must be finite"):
        code_matrix(np.full((2, 2), np.inf), 4)
