"""The registry: every method holds what it claims, in the bytes that its formula says."""

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest

import veloxbench.methods.ratequant
from veloxbench import methods
from veloxbench.adapter import arrays_of, bits_per_value, engagement
from veloxbench.errors import UsageError
from veloxbench.methods import BuildContext, all_methods, build, geometry, get_method, make_arm, parse_method
from veloxquant_mlx.allocators.sensitivity import HeadSensitivities, Provenance, Sensitivities

CALIBRATED = {"ratequant"}
ARMS = [
    pytest.param(name, target, marks=[pytest.mark.slow] if name in CALIBRATED else [], id=f"{name}-{target or 0:g}")
    for name, method in all_methods().items()
    for target in (method.targets or (None,))
]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    from veloxbench.models import load_model, resolve_model

    handle = resolve_model("smollm2-135m")
    model, tokenizer = load_model(handle, n_layers=2)
    return BuildContext(model, tokenizer, handle.weights_sha256, 2, tmp_path_factory.mktemp("calibration"))


@pytest.mark.parametrize(("name", "target"), ARMS)
def test_bytes_held_equal_the_formula_at_every_target(context, name, target):
    """200 tokens in passes of 150, 49 and 1: each layer engaged, in exactly the bytes of the method's formula."""
    arm = make_arm(name, target)
    reason = methods.probe(context, arm)
    if reason is not None:
        pytest.skip(reason)
    caches, claimed = build(context, arm)
    tokens = np.random.default_rng(0).integers(0, 49152, (1, 200))
    for start, stop in ((0, 150), (150, 199), (199, 200)):
        logits = context.model(mx.array(tokens[:, start:stop]), cache=caches)
        mx.eval(logits, [arrays_of(cache) for cache in caches])
    method = get_method(name)
    layers = engagement(caches, claimed, method.cache_classes)
    assert all(claimed)
    for layer, cache, shape in zip(layers, caches, geometry(caches, context.model), strict=True):
        assert Fraction(layer.used_bytes) == method.formula(cache.inner, 200, shape)
    if method.target_means == "bits_per_value":
        assert bits_per_value(layers) <= target


def test_the_window_of_a_base_is_within_the_target(context, monkeypatch):
    """KIVI's 128 fp16 tokens among 2048 are 0.875 bits: RateQuant over KIVI at 4 costs at most 4, and over 3.9."""
    rng = np.random.default_rng(0)
    heads = tuple(
        HeadSensitivities(
            layer,
            kind,
            np.exp(rng.normal(0, 2, (1, 3, 1))) * np.ones((1, 3, 64)),
            mx.array(rng.standard_normal((1, 3, 64, 64)).astype(np.float16)),
            mx.zeros((1, 3, 64, 64)),
        )
        for layer in range(2)
        for kind in ("keys", "values")
    )
    given = Sensitivities(heads, Provenance("m", "t", 1, 64, "llama", 2))
    monkeypatch.setattr(veloxbench.methods.ratequant, "_sensitivities", lambda *_: given)
    caches, _ = build(context, make_arm("ratequant", 4.0, base="kivi", unit="head"))
    assert {(c.inner.spec.keys.quantizers[0].name, c.inner.spec.values.quantizers[0].name) for c in caches} == {
        ("kivi_keys", "affine")
    }
    used = sum(c.inner.spec.expected_nbytes(2048, n_kv_heads=3, key_dim=64, value_dim=64) for c in caches)
    assert 3.9 < 8 * used / (2 * 2048 * 3 * 2 * 64) <= 4.0


def test_an_unknown_name_lists_near_matches():
    """A typing error names what was meant."""
    with pytest.raises(UsageError, match=r"did you mean .*turboquant_mse"):
        get_method("turbo_quant_mse")


def test_a_second_method_of_one_name_is_refused():
    """A collision raises; nothing is silently replaced."""
    with pytest.raises(ValueError, match="registered twice"):
        methods.register(
            "fp16",
            summary="",
            cache_classes=(),
            targets=None,
            target_means=None,
            formula=lambda *_: Fraction(0),
            implementation=lambda: "",
        )(lambda context, target: [])


def test_parameters_are_typed_on_the_command_line():
    """``name:key=value`` gives numbers where they are numbers."""
    assert parse_method("mlx-affine:group_size=32") == ("mlx-affine", {"group_size": 32})
    assert parse_method("ratequant:unit=head") == ("ratequant", {"unit": "head"})
    with pytest.raises(UsageError, match="key=value"):
        parse_method("mlx-affine:32")


def test_a_default_parameter_does_not_make_another_record():
    """Naming the default is the same arm as leaving it out."""
    assert make_arm("mlx-affine", 4.0, group_size=64) == make_arm("mlx-affine", 4.0)
