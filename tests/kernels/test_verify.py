"""The verification that users run: it reaches every line of every body, passes here, and notices a wrong body."""

import contextlib

import mlx.core as mx
import pytest
from line_coverage import line_coverage

from veloxquant_kernels import emulator, kernel, verify
from veloxquant_kernels.kernel import FOLDER, metal_text, shipped_kernels

pytestmark = pytest.mark.usefixtures("compiler")

STEMS = sorted(path.stem for path in FOLDER.glob("*.metal"))


def test_every_kernel_verifies():
    """All cases pass through the emulator with its checks, and every kernel has one."""
    outcomes = verify.verify("emulator")
    assert [f"{o.kernel}, {o.case}: {o.error} {o.detail}" for o in outcomes if not o.passed] == []
    launched_by = {"fused_attention_merge": "fused_attention"}
    kernels = {kernel.stem for kernel in shipped_kernels()}
    assert {launched_by.get(stem, stem) for stem in kernels} == {o.kernel for o in outcomes}


def test_a_wrong_body_is_an_outcome(monkeypatch):
    """A body with another shift fails its cases; one that reads out of bounds fails with the fault as detail."""
    original = metal_text("packing")

    def outcomes(old, new):
        assert old in original
        wrong = original.replace(old, new)
        monkeypatch.setattr(kernel, "metal_text", lambda stem: wrong if stem == "packing" else metal_text(stem))
        return [verify.run_case(case, "emulator") for case in verify.cases() if case.kernel == "unpack_codes"]

    assert any(not o.passed and not o.detail for o in outcomes("(32 - shift)", "(31 - shift)"))
    assert any("out of bounds" in o.detail for o in outcomes("const uint word = bit / 32", "const uint word = bit / 4"))


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1.01])
def test_an_outcome_beyond_its_bound_fails(error):
    """NaN is not a pass."""
    assert not verify.Outcome("kernel", "case", "emulator", error).passed


@pytest.mark.parametrize("fault", [RuntimeError, ValueError])
def test_a_refused_launch_is_an_outcome(fault):
    """What MLX raises at a launch (a compiler's error, a wrong device) fails the case with its text."""

    def run(backend):
        raise fault("only supports the GPU")

    outcome = verify.run_case(verify.Case("kernel", "case", run), "emulator")
    assert not outcome.passed
    assert outcome.detail == "only supports the GPU"


@pytest.mark.parametrize("stem", ["pack_codes", "fused_attention"])
def test_the_definition_is_computed_on_the_cpu(stem, monkeypatch):
    """A GPU may multiply fp32 matrices in TF32: what a kernel is compared with is computed on the CPU."""
    devices, asked = [None], []

    @contextlib.contextmanager
    def stream(device):
        devices.append(device)
        yield
        devices.pop()

    def note(original, device_of):
        def noted(*args, **options):
            asked.append(device_of(options))
            return original(*args, **options)

        return noted

    case = next(case for case in verify.cases() if case.kernel == stem)
    monkeypatch.setattr(mx, "stream", stream)
    pack = note(verify.pack_codes, lambda options: (options["backend"], devices[-1]))
    monkeypatch.setattr(verify, "pack_codes", pack)
    reference = note(verify.fused_attention_reference, lambda _: ("reference", devices[-1]))
    monkeypatch.setattr(verify, "fused_attention_reference", reference)
    case.run("emulator")
    assert ("reference", mx.cpu) in asked
    assert [device for backend, device in asked if backend == "emulator" and device is not None] == []


def test_every_line_of_every_body_runs(gcov, tmp_path, monkeypatch, record_property):
    """gcov: each executable line of each shipped body and header runs in the verification's cases."""
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path))
    with emulator.session("coverage") as record:
        for case in verify.cases():
            case.run("emulator")
    covered = line_coverage(record.launches, {stem: metal_text(stem) for stem in STEMS})
    executable = {stem: lines for stem, lines in covered.items() if lines}
    assert set(STEMS) - set(executable) <= {"exact"}  # a pragma is no statement
    missed = {stem: [n for n, count in lines.items() if count == 0] for stem, lines in executable.items()}
    record_property("executable lines", sum(map(len, executable.values())))
    record_property("not run", sum(map(len, missed.values())))
    assert {stem: lines for stem, lines in missed.items() if lines} == {}
    assert sum(map(len, executable.values())) > 150
