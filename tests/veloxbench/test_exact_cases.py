"""The exact suite: its inputs decide nothing by rounding, its digests see damage, its cases cover the package."""

import dataclasses
import json
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from veloxbench.gate.gate import ROUNDING
from veloxbench.measure.exact import DIGEST_HEX, N_SKETCHES, FixedInputs, digest, lattice_vectors, observe, sketch
from veloxbench.measure.exact_cases import cases
from veloxquant_kernels.rotation import Rotation
from veloxquant_mlx.methods import METHODS
from veloxquant_mlx.quantizers import turboquant_mse
from veloxquant_mlx.transforms.rotation import rotation_matrix

EVERYTHING = """
import json, veloxbench
from veloxbench.measure.exact import observe
from veloxbench.measure.exact_cases import cases
found = {}
for case in cases():
    if case.arm.name in ("affine", "kivi", "pack_codes", "pack_trits", "ratequant"):
        continue  # no product of matrices in them
    if case.arm.name in ("rvq", "turboquant_prod") and case.arm.target > 2:
        continue  # seconds of codebooks, and the same products as below
    metrics, samples = observe(case)
    found[case.arm.label] = ({name: metric.value for name, metric in metrics.items()}, samples)
print(json.dumps(found))
"""


def case_of(label: str):
    return next(case for case in cases() if case.arm.label == label)


def everything(**environment: str):
    """The cases in a process of their own."""
    command = [sys.executable, "-W", "error", "-c", EVERYTHING]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here():
    return everything()


@pytest.mark.parametrize(
    "environment",
    [
        {"MKL_CBWR": "COMPATIBLE"},
        pytest.param({"VELOXBENCH_BLAS": "none"}, marks=pytest.mark.slow),
    ],
)
def test_facts_are_those_of_every_blas(here, environment):
    """Another BLAS library (or another of MKL's code paths) gives the same digests, and samples within rounding."""
    other = everything(**environment)
    assert other.keys() == here.keys()
    for label, (metrics, samples) in here.items():
        assert other[label][0] == metrics, label
        for name, values in samples.items():
            scale = np.sqrt(np.mean(np.square(values)))
            assert np.max(np.abs(np.subtract(other[label][1][name], values))) <= ROUNDING * scale, (label, name)


def test_every_method_and_width_of_the_package_is_looked_at():
    """A registered method without a case would be gated by nothing."""
    looked_at = {(case.arm.name, case.arm.target) for case in cases()}
    for name in METHODS:
        assert any(method == name for method, _ in looked_at), name
        options = METHODS[name]
        if "code_bits" in {field.name for field in dataclasses.fields(options)}:
            assert {(name, float(bits)) for bits in options.widths} <= looked_at


def test_labels_are_unique():
    """Two cases of one label would share a record."""
    labels = [case.arm.label for case in cases()]
    assert len(set(labels)) == len(labels)


def test_vectors_have_a_whole_odd_length():
    """Their squares sum to an odd square, exactly; one pair is zero; even prefixes have mean zero."""
    vectors = lattice_vectors((2, 2, 32, 64), 0).astype(np.float64).reshape(-1, 64)
    smallest = np.array([np.min(np.abs(row[row != 0]), initial=np.inf) for row in vectors])
    lengths = np.sqrt((vectors**2).sum(axis=1))
    assert (lengths == 0).sum() == 2
    assert np.abs(lattice_vectors((2, 2, 32, 64), 0)[..., :10, :].astype(np.float64).sum(axis=-2)).max() == 0
    powers = np.log2(smallest[lengths > 0])
    assert np.array_equal(powers, np.round(powers))
    whole = lengths[lengths > 0] / 2.0 ** np.round(np.log2(lengths[lengths > 0] / 15))
    assert set(whole) == {15.0}


def test_rotated_coordinates_keep_away_from_the_boundaries():
    """At 8 bits, in double precision, no coordinate is nearer to a boundary than 64 ulp of fp32 at that size."""
    vectors = FixedInputs().tensor(0, 99).astype(np.float64).reshape(-1, 64)
    vectors = vectors[(vectors**2).sum(axis=1) > 0]
    unit = vectors / np.sqrt((vectors**2).mean(axis=1, keepdims=True))
    rotated = unit @ np.array(rotation_matrix(64, 0)).astype(np.float64)
    for bits in range(1, 9):
        boundaries = turboquant_mse.TurboQuantMSE(bits).codebook(64).boundaries
        distance = np.min(np.abs(rotated[..., None] - boundaries))
        assert distance > 64 * np.finfo(np.float32).eps, bits


@pytest.mark.parametrize(
    "other", [np.arange(6, dtype=np.uint16), np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([0, 1, 2, 3, 5, 4])]
)
def test_a_digest_is_of_bytes_dtype_and_shape(other):
    """Six codes as another dtype, another shape or in another order are not the same fact; 48 bits fit a double."""
    value = digest(np.arange(6, dtype=np.uint8))
    assert value != digest(other)
    assert value == int(float(value)) < 16**DIGEST_HEX


def test_objects_have_no_digest():
    """An array of pointers is another one in every process."""
    with pytest.raises(TypeError, match="objects"):
        digest(np.array([None]))


def test_a_sketch_is_as_large_as_a_value_and_sees_one_of_them():
    """Sums under random signs over sqrt(n) have the values' own variance; a change of one value moves all of them."""
    values = np.random.default_rng(0).standard_normal(4096)
    before = np.array(sketch(values))
    assert len(before) == N_SKETCHES
    assert np.mean(before**2) == pytest.approx(1.0, abs=4 * np.sqrt(2 / N_SKETCHES))
    values[7] += 0.01
    assert np.allclose(np.abs(np.array(sketch(values)) - before), 0.01 / 64)


def shifted_centroids(monkeypatch):
    original = turboquant_mse.unpack_unrotate
    monkeypatch.setattr(turboquant_mse, "unpack_unrotate", lambda *arguments: original(*arguments) * 1.01)


def rotation_left_out(monkeypatch):
    monkeypatch.setattr(turboquant_mse, "rotation", lambda head_dim, seed: Rotation(mx.eye(head_dim)))


def norms_of_half_precision_steps(monkeypatch):
    original = turboquant_mse.rotate_quantize_pack

    def changed(*arguments):
        words, norms = original(*arguments)
        return words, norms * (1 + 2.0**-10)

    monkeypatch.setattr(turboquant_mse, "rotate_quantize_pack", changed)


@pytest.mark.parametrize("damage", [shifted_centroids, rotation_left_out, norms_of_half_precision_steps])
def test_damage_changes_the_facts(monkeypatch, damage):
    """Centroids 1% off, no rotation, norms one step of fp16 off: each moves a digest or a sample beyond rounding."""
    case = case_of("turboquant_mse@4")
    metrics, samples = observe(case)
    damage(monkeypatch)
    damaged_metrics, damaged_samples = observe(case)

    def far(name: str) -> bool:
        size = np.sqrt(np.mean(np.square(samples[name])))
        return bool(np.max(np.abs(np.subtract(samples[name], damaged_samples[name]))) > ROUNDING * size)

    assert damaged_metrics != metrics or any(far(name) for name in samples)
