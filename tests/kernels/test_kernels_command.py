"""``veloxbench kernels`` as a user types it: what there is, and whether it is right on this machine."""

import itertools
import re

import mlx.core as mx
import pytest

from veloxbench.cli.app import _run as veloxbench
from veloxquant_kernels import emulator, kernel, verify
from veloxquant_kernels.kernel import FOLDER, metal_text, shipped_kernels

PACKING = ("pack_codes", "unpack_codes")


@pytest.fixture
def two_cases(compiler, monkeypatch):
    """The verification cut to one case of packing and one of unpacking, which compile in a second."""
    cut = list(itertools.islice((case for case in verify.cases() if case.kernel in PACKING), 2))
    monkeypatch.setattr(verify, "cases", lambda: iter(cut))


def test_the_list_holds_every_body_and_its_format(capsys):
    """Each shipped .metal file has its entry; one of them repeats the layout that its text promises."""
    assert veloxbench(["kernels"]) == 0
    printed = capsys.readouterr().out
    bodies = {path.stem for path in FOLDER.glob("*.metal")}
    assert sorted(re.findall(r"^(\w+)\.metal: ", printed, re.MULTILINE)) == sorted(bodies)
    assert "codes [rows, D] uint8 or uint32 -> words [rows, ceil(D * CODE_BITS / 32)] uint32" in printed
    assert {k.stem for k in shipped_kernels()} == bodies - {"affine", "exact", "packing", "rans", "rotation"}
    assert re.search(r"^metal +(available|no Metal device)", printed, re.MULTILINE)
    assert re.search(r"^emulator +", printed, re.MULTILINE)


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_verify_prints_a_table_and_says_that_there_is_no_metal(two_cases, capsys):
    """Right kernels: exit 0, one sentence about the missing device, a row per kernel that agrees to every bit."""
    assert veloxbench(["kernels", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Metal cannot run here (no Metal device)") == 1
    for name in PACKING:
        assert re.search(rf"^{name} +emulator +1 +every bit +ok", printed, re.MULTILINE)


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_a_wrong_kernel_exits_1(compiler, monkeypatch, capsys):
    """A body with another shift fails its row and is named with its error."""
    wrong = metal_text("packing").replace("(32 - shift)", "(31 - shift)")
    assert wrong != metal_text("packing")
    monkeypatch.setattr(kernel, "metal_text", lambda stem: wrong if stem == "packing" else metal_text(stem))
    three_bits = next(case for case in verify._packing(3, 65) if case.kernel == "unpack_codes")
    monkeypatch.setattr(verify, "cases", lambda: iter([three_bits]))
    assert veloxbench(["kernels", "--verify"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"^unpack_codes +emulator +1 +inf of the bound +FAILED", printed.out, re.MULTILINE)
    assert "FAILED unpack_codes, 3 bits, rows of 65: error inf times its bound" in printed.err


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_without_a_compiler_it_is_one_sentence_and_exit_5(monkeypatch, capsys):
    """Nothing runs, nothing is printed but what is missing and how to get it."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    emulator.find_compiler.cache_clear()
    try:
        assert veloxbench(["kernels", "--verify"]) == 5
    finally:
        emulator.find_compiler.cache_clear()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"veloxbench: no Metal device here.* install g\+\+ or clang.*\n", printed.err)


def test_the_reference_is_not_verified_against_itself():
    """A comparison that cannot fail is refused."""
    with pytest.raises(ValueError, match="compared with"):
        verify.verify("reference")
