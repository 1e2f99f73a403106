"""Every quantizer: distortion on Gaussian input against theory, cost, shapes, determinism."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from impl_inputs import gaussian

from veloxquant_kernels.packing import packed_words
from veloxquant_mlx.methods import METHODS, Role, make_options
from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.quantizers.affine import Affine
from veloxquant_mlx.quantizers.base import Codes, Quantizer, quantizer_from_spec
from veloxquant_mlx.quantizers.kivi import PerChannelAffine
from veloxquant_mlx.quantizers.lloyd_max import SphereMarginal, lloyd_max
from veloxquant_mlx.quantizers.per_head import PerHead
from veloxquant_mlx.quantizers.rvq import RVQ
from veloxquant_mlx.quantizers.ternary import Ternary
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_prod import TurboQuantProd, TurboQuantProdAdaptive
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic
from veloxquant_mlx.transforms.rotation import rotation_matrix

HEAD_DIMS = (48, 64, 80, 96, 128, 256)
THEORY = 0.01
"""Agreement with theory that is asked for; the standard error of the samples below is at most a third of it."""

VALUES = {bits: 500_000 if bits <= 2 else 2_000_000 if bits <= 4 else 6_000_000 for bits in range(9)}
"""Sampled values: at high widths few values lie in the outer cells, which carry much of the error."""


def distortion(quantizer: Quantizer, x: np.ndarray) -> float:
    """Energy of the error over energy of the input."""
    decoded = quantizer.decode(quantizer.encode(mx.array(x)), mx.float32)
    return float(np.sum((np.array(decoded) - x) ** 2) / np.sum(x**2))


def as_good_as_said(quantizer: Quantizer, x: np.ndarray) -> None:
    """The distortion on Gaussian vectors is what theory says of this quantizer, and without a theory no more than a
    scalar code of high resolution leaves at the same bits per value (Panter & Dite 1951: √3π/2 · 4^(−b))."""
    expected = quantizer.expected_distortion(x.shape[-1])
    measured = distortion(quantizer, x)
    if expected is not None:
        assert measured == pytest.approx(expected, rel=0.03)  # three times the error of 200,000 values at any width
        return
    assert measured <= np.sqrt(3) * np.pi / 2 * 4.0 ** -float(quantizer.bits_per_value(x.shape[-1]))


ROLES: list[tuple[str, Role]] = [(name, role) for name in METHODS for role in ("keys", "values")]


@pytest.mark.parametrize(("method", "role"), ROLES, ids=str)
def test_every_method_is_as_good_as_it_says(method: str, role: Role) -> None:
    """Each registered method's quantizer of each side, with its default options (at 4 bits where it must be told)."""
    options = make_options(method, {})
    as_good_as_said(options.quantizer(role, 4 if options.needs_allocation else None, 0), gaussian((1, 2, 1600, 64)))


@dataclass(frozen=True)
class TooLong(RVQ):
    """Decodes 1.5 times too long."""

    theory: float | None = None

    def _decode(self, codes: Codes) -> mx.array:
        return super()._decode(codes) * 1.5

    def expected_distortion(self, head_dim: int) -> float | None:
        return self.theory


@pytest.mark.parametrize("theory", [None, 0.108])
def test_a_quantizer_that_decodes_too_long_is_noticed(theory: float | None) -> None:
    """Vectors 1.5 times too long leave .25 + .75 D of the energy, .33 at 2 bits: three times what is promised."""
    x = gaussian((1, 2, 1600, 64))
    assert distortion(TooLong(), x) == pytest.approx(0.25 + 0.75 * 0.108, rel=0.03)
    with pytest.raises(AssertionError):
        as_good_as_said(TooLong(theory=theory), x)


@pytest.mark.parametrize(
    ("code_bits", "head_dim"),
    [(bits, dim) for bits in range(1, 9) for dim in (HEAD_DIMS if bits <= 4 else (48, 128))],
)
def test_turboquant_mse_leaves_the_sphere_distortion(code_bits: int, head_dim: int) -> None:
    """On Gaussian vectors the relative error is the Lloyd–Max distortion of the sphere's marginal."""
    x = gaussian((1, 2, VALUES[code_bits] // head_dim // 2, head_dim), seed=code_bits)
    expected = lloyd_max(SphereMarginal(head_dim), 1 << code_bits).distortion
    assert distortion(TurboQuantMSE(code_bits), x) == pytest.approx(expected, rel=THEORY)


@pytest.mark.parametrize("code_bits", range(1, 9))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_turboquant_mse_costs_its_codes_and_a_norm(head_dim: int, code_bits: int) -> None:
    """The cost is the padded words plus 16 bits per vector; the encoded arrays have exactly that size."""
    quantizer = TurboQuantMSE(code_bits)
    expected = Fraction(32 * packed_words(head_dim, code_bits) + 16, head_dim)
    assert quantizer.bits_per_value(head_dim) == expected
    codes = quantizer.encode(mx.array(gaussian((2, 3, 5, head_dim))))
    assert Fraction(8 * sum(array.nbytes for array in codes.arrays), 2 * 3 * 5 * head_dim) == expected


def test_zero_vectors_decode_to_zero() -> None:
    """A zero vector has norm zero and comes back as zeros, not NaN."""
    quantizer = TurboQuantMSE(2)
    decoded = quantizer.decode(quantizer.encode(mx.zeros((1, 1, 3, 64))), mx.float32)
    assert mx.array_equal(decoded, mx.zeros((1, 1, 3, 64)))


@pytest.mark.parametrize(("code_bits", "head_dim"), [*((bits, 96) for bits in (1, 2, 3, 4, 6)), (2, 80), (3, 50)])
@pytest.mark.parametrize("group_size", [16, 32])
def test_min_max_codes_leave_the_order_statistics_distortion(code_bits: int, head_dim: int, group_size: int) -> None:
    """Affine along channels (the last group may be short) and KIVI keys along tokens: error as order statistics say."""
    x = gaussian((1, 2, 9600, head_dim), seed=5)
    for quantizer in (Affine(code_bits, group_size), PerChannelAffine(code_bits, group_size)):
        assert distortion(quantizer, x) == pytest.approx(quantizer.expected_distortion(head_dim), rel=THEORY)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_ternary_leaves_0_190(head_dim: int) -> None:
    """Three levels leave the sphere's three-level distortion, .190 for large head_dim (Max 1960), at 1.6 bits."""
    expected = lloyd_max(SphereMarginal(head_dim), 3).distortion
    assert 0.18 < expected < 0.1902
    assert distortion(Ternary(), gaussian((1, 2, 4000, head_dim), seed=2)) == pytest.approx(expected, rel=THEORY)
    assert Ternary().bits_per_value(head_dim) == Fraction(8 * -(-head_dim // 5) + 16, head_dim)


@pytest.mark.parametrize("code_bits", range(5))
def test_static_scales_leave_lloyd_max(code_bits: int) -> None:
    """A mean and a scale per head, calibrated on other tokens, leave the Gaussian distortion; 0 bits the variance."""
    x = gaussian((1, 2, 20000, 64), seed=3) * np.float32(3) + np.float32(5)
    quantizer = TurboQuantStatic(code_bits, calibration=4096)
    static = quantizer.calibrate(mx.array(x[:, :, :4096]))
    decoded = quantizer.decode(quantizer.encode(mx.array(x[:, :, 4096:]), static), mx.float32)
    error = float(np.mean((np.array(decoded) - x[:, :, 4096:]) ** 2)) / 9
    expected = {0: 1.0, 1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}[code_bits]
    assert error == pytest.approx(expected, rel=THEORY)
    assert quantizer.bits_per_value(64) == code_bits


D_PROD = {1: 1.5708, 2: 0.5708, 3: 0.1845, 4: 0.0543}
"""head_dim times the variance of inner products of unit vectors under TurboQuant Prod (arXiv 2504.19874)."""


@pytest.mark.parametrize("code_bits", D_PROD)
def test_prod_inner_products_have_the_papers_bias_and_variance(code_bits: int) -> None:
    """Over 40 seeds, <y, decoded> - <y, x> has mean zero and variance D_prod / d for random unit x and y."""
    head_dim, n = 128, 1500
    x, y = (gaussian((40, 1, n, head_dim), seed=100 + i) for i in range(2))
    x, y = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, y))
    errors = []
    for seed in range(40):
        quantizer = TurboQuantProd(code_bits, seed)
        decoded = np.array(quantizer.decode(quantizer.encode(mx.array(x[seed : seed + 1])), mx.float32))
        errors.append(np.sum(y[seed] * (decoded[0] - x[seed]), axis=-1).ravel())
    error = np.concatenate(errors)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)
    standard_error = np.sqrt(2 / error.size)
    scalar = 1.0 if code_bits == 1 else lloyd_max(SphereMarginal(head_dim), 1 << (code_bits - 1)).distortion
    exact = (np.pi / 2 - 1 / head_dim) * scalar
    assert error.var() * head_dim == pytest.approx(exact, rel=THEORY + 3 * standard_error)
    assert exact == pytest.approx(D_PROD[code_bits], rel=0.025)  # the paper's figures are the limit of large d


@pytest.mark.parametrize("code_bits", [1, 2, 4])
def test_prod_is_unbiased_along_the_vector_and_mse_is_not(code_bits: int) -> None:
    """Regressing decoded on x gives 1 for Prod and 1 - D for MSE, the shrinkage of a least-squares code."""
    x = gaussian((1, 1, 8000, 128), seed=7)

    def gain(quantizer: Quantizer) -> float:
        decoded = np.array(quantizer.decode(quantizer.encode(mx.array(x)), mx.float32))
        return float(np.sum(decoded * x) / np.sum(x * x))

    prod = np.mean([gain(TurboQuantProd(code_bits, seed)) for seed in range(6)])
    assert prod == pytest.approx(1, abs=0.01)
    assert gain(TurboQuantMSE(code_bits)) == pytest.approx(
        1 - lloyd_max(SphereMarginal(128), 1 << code_bits).distortion, abs=0.003
    )


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("code_bits", range(1, 9))
def test_prod_distortion_is_that_of_its_sketch(code_bits: int, head_dim: int) -> None:
    """The squared error is D(code_bits - 1) times the exact energy of this seed's sketch error."""
    quantizer = TurboQuantProd(code_bits, seed=code_bits)
    x = gaussian((1, 2, VALUES[code_bits] // head_dim // 2, head_dim), seed=11)
    assert distortion(quantizer, x) == pytest.approx(quantizer.expected_distortion(head_dim), rel=THEORY)


def test_sketch_distortion_averages_to_theory() -> None:
    """Over 200 seeds the sketch leaves pi/2 - 1/d of the residual."""
    energies = [TurboQuantProd(1, seed).expected_distortion(64) for seed in range(200)]
    assert np.mean(energies) == pytest.approx(np.pi / 2 - 1 / 64, rel=THEORY)


@pytest.mark.parametrize("code_bits", [1, 2])
def test_vector_codes_beat_scalar_codes_at_low_rates(code_bits: int) -> None:
    """One and two stages leave less than Lloyd–Max at the same cost, and more than the rate-distortion bound."""
    for head_dim in (48, 128):
        got = distortion(RVQ(code_bits), gaussian((1, 2, 2000, head_dim), seed=1))
        scalar = lloyd_max(SphereMarginal(head_dim), 1 << code_bits).distortion
        assert 2.0 ** (-2 * code_bits) < got < 0.97 * scalar
        assert RVQ(code_bits).bits_per_value(head_dim) <= TurboQuantMSE(code_bits).bits_per_value(head_dim)


def test_residual_stages_keep_dividing_the_error() -> None:
    """Each of five stages leaves at most 0.42 of the error before it."""
    x = gaussian((1, 1, 1000, 64), seed=1)
    errors = [distortion(RVQ(stages), x) for stages in range(1, 6)]
    assert all(after < 0.42 * before for before, after in zip([1.0, *errors], errors, strict=False))


ADAPTIVE_COSINES = {2: 0.80, 3: 0.92, 4: 0.97}
"""1 / sqrt(1 + pi/2 D(b - 1)): the cosine of TurboQuant Prod at each width, to two places."""


@pytest.mark.parametrize(("threshold", "code_bits"), [(0.25, 2), (0.10, 3), (0.05, 4)])
def test_adaptive_climbs_until_the_cosine_suffices(threshold: float, code_bits: int) -> None:
    """Gaussian blocks stop at the first width whose cosine reaches 1 - threshold: 2, 3 and 4 bits."""
    x = mx.array(gaussian((1, 2, 320, 128), seed=4))
    observer = DistortionObserver()
    quantizer = TurboQuantProdAdaptive(base_bits=2, max_bits=4, distortion_threshold=threshold, observer=observer)
    np.testing.assert_array_equal(quantizer.choose(x), np.full(10, code_bits - 2))
    quantizer.encode(x)
    (row,) = observer.report().rows
    assert row.code_bits == code_bits
    assert row.n_vectors == 640
    assert row.cosine == pytest.approx(ADAPTIVE_COSINES[code_bits], abs=0.015)


def easy_and_hard(head_dim: int = 64) -> np.ndarray:
    """Blocks of 32 tokens: Gaussian, then vectors that rotate onto ±1 (one bit describes them), in turns."""
    hard = gaussian((1, 1, 64, head_dim), seed=1)
    signs = np.sign(gaussian((1, 1, 64, head_dim), seed=2))
    easy = signs @ np.array(rotation_matrix(head_dim, 0)).T
    blocks = [hard[:, :, :32], easy[:, :, :32], hard[:, :, 32:], easy[:, :, 32:]]
    return np.concatenate(blocks, axis=2).astype(np.float32)


def test_adaptive_blocks_differ_with_their_quality() -> None:
    """Gaussian blocks take 4 bits and easily coded blocks stay at 2; bytes and decoding follow each block."""
    x = easy_and_hard()
    quantizer = TurboQuantProdAdaptive(base_bits=2, max_bits=4, distortion_threshold=0.05)
    codes = quantizer.encode(mx.array(x))
    np.testing.assert_array_equal(np.array(codes.arrays[0]).ravel(), [2, 0, 2, 0])
    bits = 8 * sum(array.nbytes for array in codes.arrays)
    assert bits == 64 * 64 * (2.5 + 4.5) + 4 * 8
    decoded = np.array(quantizer.decode(codes, mx.float32))
    for block in range(4):
        part = slice(32 * block, 32 * block + 32)
        cosine = np.sum(decoded[:, :, part] * x[:, :, part]) / (
            np.linalg.norm(decoded[:, :, part]) * np.linalg.norm(x[:, :, part])
        )
        assert cosine > 0.95


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_bits": 0}, "base_bits must be within 1..8, got 0"),
        ({"base_bits": 5}, "max_bits must be at least base_bits=5, got 4"),
        ({"distortion_threshold": 1.0}, r"distortion_threshold must be within \(0, 1\), got 1.0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
    ],
)
def test_adaptive_names_what_is_out_of_range(fields: dict[str, float], message: str) -> None:
    """Every argument outside its range is an error that names it."""
    with pytest.raises(ValueError, match=message):
        TurboQuantProdAdaptive(**fields)  # type: ignore[arg-type]


EVERY_KIND: list[Quantizer] = [
    TurboQuantMSE(3, seed=7),
    TurboQuantProd(1),
    TurboQuantProd(4),
    TurboQuantProdAdaptive(block_size=8),
    RVQ(2),
    Affine(3, 16),
    PerChannelAffine(2, 8),
    Ternary(),
    TurboQuantStatic(2, calibration=8),
    TurboQuantStatic(0, calibration=8),
    PerHead((TurboQuantMSE(2), TurboQuantMSE(4), TurboQuantMSE(2))),
]
for _method, _role in ROLES:  # a new method comes by itself, with its default options
    _options = make_options(_method, {})
    _quantizer = _options.quantizer(_role, 4 if _options.needs_allocation else None, 0)
    if _quantizer.name not in {quantizer.name for quantizer in EVERY_KIND}:
        EVERY_KIND.append(_quantizer)


@pytest.mark.parametrize("quantizer", EVERY_KIND, ids=lambda q: f"{q.name}-{getattr(q, 'code_bits', '')}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_follow_the_contract(quantizer: Quantizer, head_dim: int) -> None:
    """Shapes, dtypes and determinism; the spec rebuilds an equal quantizer; a wrong shape is refused."""
    x = mx.array(gaussian((2, 3, 24, head_dim), seed=6)).astype(mx.float16)
    codes = quantizer.encode(x)
    assert all(array.ndim == 4 for array in codes.arrays)
    assert quantizer.decode(codes).dtype == mx.float16
    assert quantizer.decode(codes, mx.float32).shape == x.shape
    again = quantizer.encode(x)
    assert all(mx.array_equal(a, b) for a, b in zip(codes.arrays, again.arrays, strict=True))
    rebuilt = quantizer_from_spec(quantizer.spec())
    assert rebuilt == quantizer
    assert mx.array_equal(rebuilt.decode(codes), quantizer.decode(codes))
    with pytest.raises(ValueError, match=r"\[B, H, T, D\]"):
        quantizer.encode(x[0])


PER_TOKEN = [q for q in EVERY_KIND if not isinstance(q, TurboQuantProdAdaptive)]


@pytest.mark.parametrize("quantizer", PER_TOKEN, ids=lambda q: f"{q.name}-{getattr(q, 'code_bits', '')}")
def test_blocks_are_independent_and_cost_the_formula(quantizer: Quantizer) -> None:
    """Slicing codes along axis 2 decodes to the slice; arrays hold exactly bits_per_value."""
    x = mx.array(gaussian((1, 3, 24, 64), seed=6))
    codes = quantizer.encode(x)
    assert [array.dtype for array in codes.arrays] == [spec.dtype for spec in quantizer.layout(64)]
    cut = 16 // quantizer.block_tokens
    part = Codes(tuple(array[:, :, :cut] for array in codes.arrays), 64, 16, codes.static)
    np.testing.assert_allclose(
        np.array(quantizer.decode(part, mx.float32)),
        np.array(quantizer.decode(codes, mx.float32))[:, :, :16],
        atol=1e-5,
    )
    assert Fraction(8 * sum(array.nbytes for array in codes.arrays), x.size) == quantizer.bits_per_value(64)


def test_each_head_gets_its_own_quantizer() -> None:
    """Heads of 2, 4 and 2 bits decode like the three quantizers on their own heads."""
    x = mx.array(gaussian((2, 3, 5, 64), seed=6))
    parts = [TurboQuantMSE(2), TurboQuantMSE(4), TurboQuantMSE(2)]
    quantizer = PerHead(tuple(parts))
    decoded = quantizer.decode(quantizer.encode(x), mx.float32)
    for head, part in enumerate(parts):
        expected = part.decode(part.encode(x[:, head : head + 1]), mx.float32)
        np.testing.assert_allclose(np.array(decoded[:, head : head + 1]), np.array(expected), atol=1e-5)
    assert quantizer.bits_per_value(64) == Fraction(8, 3) + Fraction(1, 4)
    with pytest.raises(ValueError, match="3 quantizers for 2 KV heads"):
        quantizer.encode(x[:, :2])


def test_tokens_come_in_whole_blocks() -> None:
    """KIVI keys refuse a number of tokens that is no multiple of the group."""
    with pytest.raises(ValueError, match="blocks of 32, got T=33"):
        PerChannelAffine().encode(mx.zeros((1, 1, 33, 64)))
