"""Packing, TurboQuant and affine kernels: the executed ``.metal`` bodies against the plain-MLX definitions.

Codes, norms, scales and decoded values are compared bit for bit: bodies and references sum in the same order.
"""

from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from covering import pairwise

import veloxquant_mlx.packing as impl_packing
from veloxquant_kernels import emulator, lint
from veloxquant_kernels.affine_quantize_pack import affine_quantize_pack
from veloxquant_kernels.affine_unpack_dequantize import affine_unpack_dequantize
from veloxquant_kernels.emulator.build import restore
from veloxquant_kernels.kernel import FOLDER, resolve_backend, shipped_kernels
from veloxquant_kernels.kivi_quantize_pack import kivi_quantize_pack
from veloxquant_kernels.pack_codes import pack_codes, pack_codes_reference
from veloxquant_kernels.pack_trits import pack_trits
from veloxquant_kernels.rotate_quantize_pack import rotate_quantize_pack
from veloxquant_kernels.rotation import hadamard_transform, rotate, unrotate
from veloxquant_kernels.unpack_codes import unpack_codes
from veloxquant_kernels.unpack_dequantize_unrotate import unpack_dequantize_unrotate
from veloxquant_kernels.unpack_trits import unpack_trits
from veloxquant_kernels.verify import same_bits
from veloxquant_mlx.quantizers.affine import Affine
from veloxquant_mlx.quantizers.kivi import PerChannelAffine
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import rotation_matrix, rotation_signs

WIDTHS = range(1, 9)
HEAD_DIMS = (48, 64, 80, 96, 128, 256)
LENGTHS = (1, 3, 31, 33, 1000)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
FACTORS = {"code_bits": list(WIDTHS), "head_dim": list(HEAD_DIMS), "length": list(LENGTHS), "dtype": list(DTYPES)}

COVERING = pairwise(FACTORS)
EVERY = [
    pytest.param(*row, marks=pytest.mark.slow)
    for row in np.stack(np.meshgrid(*(np.arange(len(v)) for v in FACTORS.values()), indexing="ij"), -1).reshape(-1, 4)
    for row in [tuple(v[i] for v, i in zip(FACTORS.values(), row, strict=True))]
    if row not in COVERING
]
cases = pytest.mark.parametrize(("code_bits", "head_dim", "length", "dtype"), [*COVERING, *EVERY])


@pytest.fixture
def checked(compiler):
    with emulator.session("checked", seed=7) as record:
        yield record


def gaussian(shape, dtype=mx.float32, seed=0):
    """Gaussian values with an outlier channel, as keys have."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x[..., 3] *= 20
    return mx.array(x).astype(dtype)


def random_codes(shape, levels, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, levels, shape).astype(np.uint8))


def turboquant_tables(head_dim, code_bits, seed=0):
    """Signs, edges and centroids of the quantizer that uses these kernels."""
    codebook = TurboQuantMSE(code_bits, seed).codebook(head_dim)
    edges, centroids = (mx.array(x.astype(np.float32)) for x in (codebook.boundaries, codebook.centroids))
    return rotation_signs(head_dim, seed), edges, centroids


# ---- packing -------------------------------------------------------------------------------------


def test_packed_layout_by_hand():
    """Three-bit codes 1, 2, 3, ... little-endian: 0b...011_010_001, the eleventh straddling into word 1."""
    codes = mx.array([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7]], dtype=mx.uint8)
    value = sum(int(code) << (3 * j) for j, code in enumerate(np.array(codes)[0]))
    words = [value & 0xFFFFFFFF, value >> 32]
    assert np.array(pack_codes(codes, 3, backend="reference")).tolist() == [words]


@pytest.mark.parametrize("code_bits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_are_packed_and_unpacked_as_defined(code_bits, head_dim, checked):
    """Words equal the definition's and the cache's own packing; every thread's accesses are in bounds."""
    codes = random_codes((2, 3, head_dim), 1 << code_bits)
    words = pack_codes(codes, code_bits, backend="emulator")
    assert same_bits(words, pack_codes_reference(codes, code_bits))
    assert same_bits(words, impl_packing.pack_codes(codes, code_bits))
    assert same_bits(unpack_codes(words, code_bits, head_dim, backend="emulator"), codes)
    assert same_bits(unpack_codes(words, code_bits, head_dim, backend="reference"), codes)


@pytest.mark.parametrize("n_codes", [1, 2, 5, 7, 31, 32, 33, 65])
@pytest.mark.parametrize("code_bits", [1, 3, 5, 8])
def test_odd_row_lengths_pack(n_codes, code_bits, checked):
    """Rows that fill no whole word, down to one code (inputs below 8 elements arrive in constant memory)."""
    codes = random_codes((1, n_codes), 1 << code_bits).astype(mx.uint32)
    words = pack_codes(codes, code_bits, backend="emulator")
    assert same_bits(words, pack_codes_reference(codes, code_bits))
    assert same_bits(unpack_codes(words, code_bits, n_codes, backend="emulator"), codes.astype(mx.uint8))


def test_packing_reads_and_writes_each_byte_once(checked):
    """A width that divides 32 moves exactly its input and output."""
    pack_codes(random_codes((64, 128), 16), 4, backend="emulator")
    report = checked.launches[-1]
    assert report.traffic("codes").bytes_read == 64 * 128
    assert report.traffic("words").bytes_written == 64 * 128 // 2


@pytest.mark.parametrize("n_trits", [1, 4, 5, 6, 64, 80, 128])
def test_trits_are_packed_and_unpacked_as_defined(n_trits, checked):
    """Bytes equal the definition's and the cache's own packing."""
    trits = random_codes((3, 7, n_trits), 3)
    data = pack_trits(trits, backend="emulator")
    assert same_bits(data, pack_trits(trits, backend="reference"))
    assert same_bits(data, impl_packing.pack_trits(trits))
    assert same_bits(unpack_trits(data, n_trits, backend="emulator"), trits)
    assert same_bits(unpack_trits(data, n_trits, backend="reference"), trits)


# ---- rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_the_quantizers(head_dim):
    """The Hadamard reference is the matrix that the caches rotate by, and unrotate is its inverse."""
    signs, _, _ = turboquant_tables(head_dim, 1)
    identity = mx.eye(head_dim)
    matrix = np.array(rotate(identity, signs))
    np.testing.assert_allclose(matrix, np.array(rotation_matrix(head_dim, 0)), atol=1e-6)
    np.testing.assert_allclose(np.array(unrotate(rotate(identity, signs), signs)), np.eye(head_dim), atol=1e-5)
    assert set(np.unique(np.array(hadamard_transform(identity)))) == {-1.0, 1.0}


# ---- TurboQuant ----------------------------------------------------------------------------------


@cases
def test_turboquant_matches_its_definition(code_bits, head_dim, length, dtype, checked):
    """Codes and norms equal the reference bit for bit, and so does what is decoded from them."""
    signs, edges, centroids = turboquant_tables(head_dim, code_bits)
    x = gaussian((1, 1, length, head_dim), dtype)
    words, norms = rotate_quantize_pack(x, signs, edges, code_bits, backend="emulator")
    expected_words, expected_norms = rotate_quantize_pack(x, signs, edges, code_bits, backend="reference")
    assert same_bits(words, expected_words)
    assert same_bits(norms, expected_norms)
    tables = (norms, centroids, signs, code_bits, dtype)
    decoded = unpack_dequantize_unrotate(words, *tables, backend="emulator")
    assert same_bits(decoded, unpack_dequantize_unrotate(words, *tables, backend="reference"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_turboquant_agrees_with_the_quantizer(head_dim):
    """The quantizer's own encoding (a matrix product, another order of sums) differs in fewer than 1 code in 10,000."""
    quantizer = TurboQuantMSE(4, 0)
    signs, edges, centroids = turboquant_tables(head_dim, 4)
    x = gaussian((1, 2, 400, head_dim), mx.float16)
    words, norms = rotate_quantize_pack(x, signs, edges, 4, backend="reference")
    codes, expected_norms = quantizer.encode(x).arrays
    differing = np.array(impl_packing.unpack_codes(words, 4, head_dim)) != np.array(
        impl_packing.unpack_codes(codes, 4, head_dim)
    )
    assert differing.mean() < 1e-4
    np.testing.assert_allclose(np.array(norms), np.array(expected_norms), rtol=2**-10)
    decoded = unpack_dequantize_unrotate(codes, expected_norms, centroids, signs, 4, mx.float32, backend="reference")
    expected = quantizer.decode(quantizer.encode(x), mx.float32)
    np.testing.assert_allclose(np.array(decoded), np.array(expected), atol=1e-5 * float(mx.max(mx.abs(expected))))


def test_a_zero_vector_decodes_to_zero(checked):
    """Its norm is zero, so whatever its codes are, it comes back as zero."""
    signs, edges, centroids = turboquant_tables(64, 2)
    words, norms = rotate_quantize_pack(mx.zeros((3, 64)), signs, edges, 2, backend="emulator")
    decoded = unpack_dequantize_unrotate(words, norms, centroids, signs, 2, backend="emulator")
    assert bool(mx.all(decoded == 0))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_codes_do_not_depend_on_the_schedule(seed, compiler):
    """Any order of threadgroups, simdgroups and lanes gives the same words."""
    signs, edges, _ = turboquant_tables(96, 3)
    x = gaussian((9, 96), mx.float16)
    expected, _ = rotate_quantize_pack(x, signs, edges, 3, backend="reference")
    with emulator.session("checked", seed):
        words, _ = rotate_quantize_pack(x, signs, edges, 3, backend="emulator")
    assert same_bits(words, expected)


def test_a_transposed_input_is_encoded_in_row_order(checked):
    """A non-contiguous array gives the codes of its contiguous copy."""
    signs, edges, _ = turboquant_tables(64, 4)
    x = gaussian((2, 5, 3, 64), mx.float16)
    swapped = x.transpose(0, 2, 1, 3)
    words, _ = rotate_quantize_pack(swapped, signs, edges, 4, backend="emulator")
    expected, _ = rotate_quantize_pack(x, signs, edges, 4, backend="emulator")
    assert same_bits(words, mx.contiguous(expected.transpose(0, 2, 1, 3)))


# ---- affine and KIVI -----------------------------------------------------------------------------


@cases
def test_affine_matches_its_definition(code_bits, head_dim, length, dtype, checked):
    """Codes, scales, zeros and decoded values equal the reference bit for bit, groups along channels."""
    x, group_size = gaussian((2, length, head_dim), dtype), 32  # does not divide 48 and 80
    packed = affine_quantize_pack(x, code_bits, group_size, backend="emulator")
    for ours, expected in zip(packed, affine_quantize_pack(x, code_bits, group_size, backend="reference"), strict=True):
        assert same_bits(ours, expected)
    arguments = (*packed, code_bits, head_dim, group_size, dtype)
    decoded = affine_unpack_dequantize(*arguments, backend="emulator")
    assert same_bits(decoded, affine_unpack_dequantize(*arguments, backend="reference"))


@cases
def test_kivi_matches_its_definition(code_bits, head_dim, length, dtype, checked):
    """The same with groups along tokens; ``length`` is the group here."""
    group_size = min(length, 32)
    x = gaussian((2, 2 * group_size, head_dim), dtype)
    packed = kivi_quantize_pack(x, code_bits, group_size, backend="emulator")
    for ours, expected in zip(packed, kivi_quantize_pack(x, code_bits, group_size, backend="reference"), strict=True):
        assert same_bits(ours, expected)
    arguments = (*packed, code_bits, head_dim, group_size, dtype)
    decoded = affine_unpack_dequantize(*arguments, per_channel=True, backend="emulator")
    assert same_bits(decoded, affine_unpack_dequantize(*arguments, per_channel=True, backend="reference"))


@pytest.mark.parametrize("code_bits", WIDTHS)
def test_affine_and_kivi_agree_with_the_quantizers(code_bits):
    """The caches' own quantizers hold the same bits."""
    x = gaussian((1, 2, 64, 80), mx.float16)
    for ours, theirs in zip(
        affine_quantize_pack(x, code_bits, 32, backend="reference"), Affine(code_bits, 32).encode(x).arrays, strict=True
    ):
        assert same_bits(ours, theirs)
    words, scales, zeros = kivi_quantize_pack(x, code_bits, 32, backend="reference")
    expected = PerChannelAffine(code_bits, 32).encode(x).arrays
    assert same_bits(words.reshape(expected[0].shape), expected[0])
    assert same_bits(scales, expected[1])
    assert same_bits(zeros, expected[2])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("code_bits", [2, 4, 8])
def test_affine_error_is_half_a_step(code_bits, per_channel):
    """Rounding to the nearest level leaves at most scale / 2, plus what fp16 scales and zeros lose."""
    x = gaussian((1, 64, 64))
    quantize = kivi_quantize_pack if per_channel else affine_quantize_pack
    words, scales, zeros = quantize(x, code_bits, 32, backend="reference")
    decoded = affine_unpack_dequantize(
        words, scales, zeros, code_bits, 64, 32, mx.float32, per_channel=per_channel, backend="reference"
    )
    step = mx.repeat(scales.astype(mx.float32), 32, axis=-2 if per_channel else -1)
    levels = 2**code_bits - 1
    fp16 = 2.0**-11 * (levels * step + mx.max(mx.abs(x)))  # half an ulp of scale, levels times, and of zero
    assert bool(mx.all(mx.abs(decoded - x) <= step / 2 + fp16))


def test_a_constant_group_has_scale_zero(checked):
    """Equal values come back exactly where fp16 holds them."""
    x = mx.full((2, 64), 3.5)
    words, scales, zeros = affine_quantize_pack(x, 4, 32, backend="emulator")
    assert float(mx.max(mx.abs(scales))) == 0
    decoded = affine_unpack_dequantize(words, scales, zeros, 4, 64, 32, mx.float32, backend="emulator")
    assert same_bits(decoded, x)


# ---- bad input -----------------------------------------------------------------------------------

X = mx.zeros((2, 64))
CODES = mx.zeros((2, 64), mx.uint8)
WORDS = mx.zeros((2, 8), mx.uint32)
NORMS = mx.zeros((2, 1), mx.float16)
SIGNS = mx.ones((64,))
BAD = {
    "width 0": (lambda: pack_codes(CODES, 0), ValueError, r"code_bits must be an integer in 1\.\.8, got 0"),
    "width 9": (lambda: unpack_codes(WORDS, 9, 64), ValueError, "got 9"),
    "no codes": (lambda: pack_codes(CODES[:0], 4), ValueError, "at least one element"),
    "float codes": (lambda: pack_codes(X, 4), TypeError, "codes must be uint8 or uint32"),
    "too few words": (lambda: unpack_codes(WORDS, 4, 65), ValueError, "fill 9"),
    "int words": (lambda: unpack_codes(WORDS.astype(mx.int32), 4, 64), TypeError, "uint32"),
    "unknown backend": (lambda: pack_codes(CODES, 4, backend="cuda"), ValueError, "'cuda'"),
    "int32 trits": (lambda: pack_trits(CODES.astype(mx.int32)), TypeError, "uint8"),
    "too few bytes": (lambda: unpack_trits(CODES, 1000), ValueError, "fill 200"),
    "int8 values": (lambda: rotate_quantize_pack(CODES, SIGNS, mx.zeros((1,)), 1), TypeError, "x must be float16"),
    "head_dim 72": (
        lambda: rotate_quantize_pack(mx.zeros((2, 72)), mx.ones((72,)), mx.zeros((1,)), 1), ValueError, "got 72"),
    "head_dim 1024": (
        lambda: rotate_quantize_pack(mx.zeros((2, 1024)), mx.ones((1024,)), mx.zeros((1,)), 1),
        ValueError, "threadgroup memory, got 1024"),
    "edges": (lambda: rotate_quantize_pack(X, SIGNS, mx.zeros((4,)), 2), ValueError, r"edges .* \(3,\)"),
    "signs": (lambda: rotate_quantize_pack(X, SIGNS[:32], mx.zeros((3,)), 2), ValueError, r"signs .* \(64,\)"),
    "norms": (
        lambda: unpack_dequantize_unrotate(WORDS, NORMS[:1], mx.zeros((16,)), SIGNS, 4), ValueError, "norms"),
    "centroids": (
        lambda: unpack_dequantize_unrotate(WORDS, NORMS, mx.zeros((8,)), SIGNS, 4), ValueError, "centroids"),
    "result dtype": (
        lambda: unpack_dequantize_unrotate(WORDS, NORMS, mx.zeros((16,)), SIGNS, 4, mx.int32), TypeError, "dtype"),
    "group": (lambda: affine_quantize_pack(X, 4, 0), ValueError, "group_size must be a positive integer, got 0"),
    "block": (lambda: kivi_quantize_pack(mx.zeros((2, 33, 64)), 4, 32), ValueError, "number of tokens, 33"),
    "large block": (
        lambda: kivi_quantize_pack(mx.zeros((256, 256)), 4, 256), ValueError, r"got 256 \* 256"),
    "scales": (
        lambda: affine_unpack_dequantize(WORDS, NORMS, NORMS, 4, 64, 32), ValueError, r"scales .* \(2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, error, message):
    """Each wrong argument is named with its value and the rule."""
    with pytest.raises(error, match=message):
        call()


NO_ROWS = {
    "pack_codes": lambda: pack_codes(CODES[:0], 4),
    "unpack_codes": lambda: unpack_codes(WORDS[:0], 4, 64),
    "pack_trits": lambda: pack_trits(CODES[:0]),
    "unpack_trits": lambda: unpack_trits(CODES[:0], 64),
    "rotate_quantize_pack": lambda: rotate_quantize_pack(X[:0], SIGNS, mx.zeros((15,)), 4),
    "unpack_dequantize_unrotate": lambda: unpack_dequantize_unrotate(WORDS[:0], NORMS[:0], mx.zeros((16,)), SIGNS, 4),
    "affine_quantize_pack": lambda: affine_quantize_pack(X[:0], 4, 32),
    "kivi_quantize_pack": lambda: kivi_quantize_pack(X[:0], 4, 32),
    "affine_unpack_dequantize": lambda: affine_unpack_dequantize(WORDS[:0], NORMS[:0], NORMS[:0], 4, 64, 64),
}


@pytest.mark.parametrize("call", NO_ROWS.values(), ids=NO_ROWS)
def test_no_tokens_are_refused(call):
    """An array without rows (T = 0) is refused by every kernel, naming the shape."""
    with pytest.raises(ValueError, match=r"at least one element, got shape \(0, "):
        call()


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_metal_without_a_device_is_refused():
    """Asking for Metal where there is none fails loudly."""
    with pytest.raises(RuntimeError, match="needs a Metal device"):
        pack_codes(CODES, 4, backend="metal")


def test_metal_needs_to_be_the_default_device(monkeypatch):
    """MLX launches Metal kernels on its default device only: with the CPU there, Metal is not taken, nor given."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with mx.stream(mx.cpu):
        assert resolve_backend(None) == "reference"
        with pytest.raises(RuntimeError, match="default device is the CPU"):
            resolve_backend("metal")


def test_outputs_beyond_32_bit_indices_are_refused():
    """Codes are up to 32 times their words: an output of 2**31 elements is refused as an input of that size is."""
    words = mx.zeros((1 << 26, 1), mx.uint32)  # lazy: never computed
    with pytest.raises(ValueError, match=r"unpack_codes: codes has 2147483648 elements; the limit is 2147483647"):
        unpack_codes(words, 1, 32, backend="emulator")


# ---- the shipped text ----------------------------------------------------------------------------


def test_the_executed_body_is_the_shipped_file(checked):
    """The text that was compiled, its rewritings undone, holds the shipped files, hash for hash."""
    signs, edges, _ = turboquant_tables(64, 4)
    rotate_quantize_pack(X, signs, edges, 4, backend="emulator")
    text = restore(Path(checked.launches[-1].source_path).read_text())
    header, rest = text.split("template <int HEAD_DIM, int ORDER, int CODE_BITS, int SIMDGROUPS>\n[[kernel]]")
    body = rest[rest.index(") {\n") + 4 : rest.index("\n}\n\ntemplate [[host_name")]
    shipped = {stem: (FOLDER / f"{stem}.metal").read_bytes() for stem in ("exact", "packing", "rotation")}
    shipped_header = b"".join(shipped.values())
    assert sha256(header.split("\n", 1)[1].encode()).hexdigest() == sha256(shipped_header).hexdigest()
    shipped_body = (FOLDER / "rotate_quantize_pack.metal").read_bytes()
    assert sha256(body.encode()).hexdigest() == sha256(shipped_body).hexdigest()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.metal")), ids=lambda path: path.stem)
def test_shipped_bodies_pass_the_lint(path):
    """Nothing in a shipped body or header is refused by Metal."""
    bodies = {kernel.stem for kernel in shipped_kernels()}
    lint.check(path.stem, path.read_text(), header=path.stem not in bodies)
