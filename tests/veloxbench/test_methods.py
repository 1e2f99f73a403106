"""The registry: every method holds what it claims, in the bytes that its formula says."""

import re
from dataclasses import replace
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest

import veloxbench.methods.ratequant
from veloxbench.errors import EngagementError, UsageError
from veloxbench.measure.account import bits_per_value, engagement
from veloxbench.methods import registry as methods
from veloxbench.methods.cache_under_test import arrays_of
from veloxbench.methods.registry import (
    BuildContext,
    Geometry,
    all_methods,
    build,
    checked,
    geometry,
    get_method,
)
from veloxbench.methods.veloxquant import storage_formula
from veloxbench.records.arm import Arm, from_earlier_label
from veloxquant_mlx.allocators.sensitivity import HeadSensitivities, Provenance, Sensitivities
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.methods import METHODS
from veloxquant_mlx.observers.key_norm import KeyNormObserver

CALIBRATED = {"ratequant"}
ARMS = [
    pytest.param(name, target, marks=[pytest.mark.slow] if name in CALIBRATED else [], id=f"{name}-{target or 0:g}")
    for name, method in all_methods().items()
    if name != "fisher_klt"  # its target holds at a context of its own: test_fisher_method.py
    for target in (method.targets or (None,))
]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    from veloxbench.inputs.models import load_model, resolve_model

    handle = resolve_model("smollm2-135m")
    model, tokenizer = load_model(handle, n_layers=2)
    return BuildContext(model, tokenizer, handle.weights_sha256, 2, tmp_path_factory.mktemp("calibration"))


@pytest.mark.parametrize(("name", "target"), ARMS)
def test_bytes_held_equal_the_formula_at_every_target(context, name, target):
    """200 tokens in passes of 150, 49 and 1: each layer engaged, in exactly the bytes of the method's formula."""
    bytes_held_equal_the_formula(context, checked(Arm(name=name, target=target)))


def test_every_method_of_the_reference_implementation_is_registered():
    """Whatever KVCacheConfig can name, the harness can measure."""
    assert set(METHODS) <= set(all_methods())


@pytest.mark.parametrize("name", sorted(set(METHODS) - CALIBRATED))
def test_values_may_have_a_width_of_their_own(context, name):
    """value_bits=2 reaches every layer's values and the formula; the keys keep the target's width."""
    target = get_method(name).targets[0]
    plain, _ = build(context, checked(Arm(name=name, target=target)))
    caches = bytes_held_equal_the_formula(context, checked(Arm(name=name, target=target, parameters={"value_bits": 2})))
    assert [cache.inner.spec.keys for cache in caches] == [cache.inner.spec.keys for cache in plain]
    assert [cache.inner.spec.values.code_bits for cache in caches] == [2] * len(caches)


@pytest.mark.parametrize("threshold", [0.04, 0.25])
def test_blocks_that_choose_their_width_are_counted_at_it(context, threshold):
    """Cosine .96 takes four bits and cosine .75 two: 6 blocks of 32 tokens, a byte each, and 8 tokens in fp16."""
    arm = checked(Arm(name="turboquant_prod_adaptive", target=8.0, parameters={"distortion_threshold": threshold}))
    caches = bytes_held_equal_the_formula(context, arm)
    method, shape = get_method(arm.name), Geometry(3, 64, 64)
    bits = {0.04: 4, 0.25: 2}[threshold]
    expected = 2 * (6 + 3 * (192 * (64 * bits + 32) // 8 + 8 * 64 * 2))
    assert [method.formula(cache.inner, 200, shape) for cache in caches] == [expected] * 2


def test_flagged_tokens_are_counted_by_the_formula(context):
    """A cache with outlier tokens has a formula too: from their number."""
    config = KVCacheConfig("turboquant_mse", outlier_observer=KeyNormObserver(outlier_threshold=1.0))
    caches = KVCacheBuilder.build(context.model, config)
    context.model(mx.array(np.random.default_rng(0).integers(0, 49152, (1, 200))), cache=caches)
    for cache in caches:
        held = sum(Fraction(held.array.nbytes * held.used_slots, held.slots) for held in cache.held_arrays())
        plain = cache.spec.keys.bits_per_value(64) * 200 * 3 * 128 / 8
        assert storage_formula(cache, 200, Geometry(3, 64, 64)) == held > plain


def test_a_scale_calibrated_anew_is_counted_by_the_formula():
    """Keys ten times larger from token 100 on open one slot: 3 heads of 16 bits and 32 bits for where it starts."""
    cache = PackedKVCache(KVCacheConfig("turboquant_static", code_bits=4).layer_spec(0, None, None, None))
    values = np.random.default_rng(0).standard_normal((1, 3, 200, 64)).astype(np.float32)
    keys = values * np.where(np.arange(200) < 100, 1, 10)[:, None].astype(np.float32)
    cache.update_and_fetch(mx.array(keys), mx.array(values))
    held = sum(Fraction(held.array.nbytes * held.used_slots, held.slots) for held in cache.held_arrays())
    codes = 2 * 3 * 200 * 64 * 4 // 8
    assert storage_formula(cache, 200, Geometry(3, 64, 64)) == held == codes + 3 * 2 + 4


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("fields", [{"outlier_observer": KeyNormObserver()}, {}], ids=["outliers", "adaptive"])
def test_lost_tokens_are_noticed_where_data_decide_the_bytes(context, fields, side):
    """A side that lost a token costs what its own formula says: its tokens are counted too."""
    config = KVCacheConfig("turboquant_mse" if fields else "turboquant_prod_adaptive", **fields)
    cache = PackedKVCache(config.layer_spec(3, None, None, None), outlier_observer=config.outlier_observer)
    x = mx.array(np.random.default_rng(0).standard_normal((1, 3, 200, 64)))
    cache.update_and_fetch(x, x)
    storage_formula(cache, 200, Geometry(3, 64, 64))
    getattr(cache.storage, side).trim(1)
    held = (199, 200) if side == "keys" else (200, 199)
    message = f"layer 3 holds {held} tokens of keys and values after 200, not 200"
    with pytest.raises(EngagementError, match=re.escape(message)):
        storage_formula(cache, 200, Geometry(3, 64, 64))


def bytes_held_equal_the_formula(context, arm):
    """Feed 200 tokens; the caches."""
    name, target = arm.name, arm.target
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
    return caches


def test_the_window_of_a_base_is_within_the_target(context, tmp_path, monkeypatch):
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
    monkeypatch.setattr(veloxbench.methods.ratequant, "calibrate_layer_sensitivities", lambda *_: given)
    own = replace(context, cache_folder=tmp_path)
    caches, _ = build(own, checked(Arm(name="ratequant", target=4.0, parameters={"base": "kivi", "unit": "head"})))
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


def test_a_method_is_written_in_one_way():
    """``name@target:key=value`` gives numbers where they are numbers; the earlier form is refused with the new one."""
    assert Arm.parse("mlx-affine:group_size=32") == Arm(name="mlx-affine", parameters={"group_size": 32})
    assert Arm.parse("ratequant@1.5:unit=head") == Arm(name="ratequant", target=1.5, parameters={"unit": "head"})
    assert str(Arm.parse("turboquant_mse@4:sinks=4")) == "turboquant_mse@4:sinks=4"
    with pytest.raises(UsageError, match="key=value"):
        Arm.parse("mlx-affine:32")
    with pytest.raises(UsageError, match="is written 'mlx-affine@4:group_size=32'"):
        Arm.parse("mlx-affine 4 (group_size=32)")


@pytest.mark.parametrize("text", ["", "@4", "fp16@", "fp16@four", "fp16@nan", "fp16:", "fp16:=1", "x@4:a=1:a=2"])
def test_what_is_no_arm_is_refused(text):
    """Half an arm is a typing error, never another arm."""
    with pytest.raises(UsageError, match=r"write|twice"):
        Arm.parse(text)


@pytest.mark.parametrize("label", ["fp16", "turboquant_mse 4", "mlx-affine 4 (group_size=32)", "cache 4 (heads=2,5)"])
def test_the_earlier_form_is_read_in_stored_baselines(label):
    """Every part of an earlier label is in the arm."""
    arm = from_earlier_label(label)
    assert arm.name == label.split()[0]
    assert all(f"{key}={value}" in label for key, value in arm.parameters.items())
    assert (arm.target is None) == (label == "fp16")


def test_a_default_parameter_does_not_make_another_record():
    """Naming the default is the same arm as leaving it out."""
    assert checked(Arm(name="mlx-affine", target=4.0, parameters={"group_size": 64})) == checked(
        Arm(name="mlx-affine", target=4.0)
    )
