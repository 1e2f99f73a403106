"""Packing, TurboQuant and affine kernels: the executed ``.metal`` bodies against plain MLX.

Codes, norms, scales and decoded values are compared bit for bit: TurboQuant's with plain MLX in the bodies'
order of sums.
"""

import itertools
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from covering import pairwise

from veloxquant_kernels import emulator, lint
from veloxquant_kernels.affine import affine_quantize_pack, affine_unpack_dequantize, kivi_quantize_pack
from veloxquant_kernels.codebook import Codebook, boundaries_array, centroids_array, decode_trits, decode_words
from veloxquant_kernels.emulator.build import restore
from veloxquant_kernels.kernel import FOLDER, launches_on, resolve_backend, shipped_kernels, use_backend
from veloxquant_kernels.packing import pack_codes, pack_trits, unpack_codes, unpack_trits
from veloxquant_kernels.rotation import (
    Rotation,
    hadamard_rotation,
    hadamard_transform,
    rotate_in_order,
    unrotate_in_order,
)
from veloxquant_kernels.turboquant import (
    decode_in_order,
    encode_in_order,
    rotate_quantize_pack,
    unpack_dequantize_unrotate,
)
from veloxquant_kernels.verify import same_bits
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import rotation, rotation_matrix

WIDTHS = range(1, 9)
HEAD_DIMS = (48, 64, 80, 96, 128, 256)
LENGTHS = (1, 3, 31, 33, 1000)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
FACTORS = {"code_bits": list(WIDTHS), "head_dim": list(HEAD_DIMS), "length": list(LENGTHS), "dtype": list(DTYPES)}


def cases(factors):
    """Rows in which every pair of two factors' values occurs; every other row of all of FACTORS is slow."""
    covering = pairwise(factors)
    others = [row for row in itertools.product(*FACTORS.values()) if row not in covering]
    rows = [*covering, *(pytest.param(*row, marks=pytest.mark.slow) for row in others)]
    return pytest.mark.parametrize(tuple(FACTORS), rows)


# 48 and 80 are no multiple of a group, 31 no multiple of a simdgroup
GROUPED = {**FACTORS, "head_dim": [48, 80, 256], "length": [1, 31, 1000]}


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
    """Rotation and codebook of the quantizer that uses these kernels."""
    return rotation(head_dim, seed), TurboQuantMSE(code_bits, seed).codebook(head_dim)


def encoded_in_order(x, turn, book, code_bits):
    """What the encoding kernel must write."""
    return encode_in_order(x, turn.signs, boundaries_array(book), code_bits)


def decoded_in_order(words, norms, turn, book, code_bits, dtype):
    """What the decoding kernel must write."""
    return decode_in_order(words, norms, centroids_array(book), turn.signs, code_bits, dtype)


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
    """Words equal plain MLX's, which other tests hold against NumPy; every thread's accesses are in bounds."""
    codes = random_codes((2, 3, head_dim), 1 << code_bits)
    words = pack_codes(codes, code_bits, backend="emulator")
    assert same_bits(words, pack_codes(codes, code_bits, backend="reference"))
    assert same_bits(unpack_codes(words, code_bits, head_dim, backend="emulator"), codes)
    assert same_bits(unpack_codes(words, code_bits, head_dim, backend="reference"), codes)


@pytest.mark.parametrize("n_codes", [1, 2, 5, 7, 31, 32, 33, 65])
@pytest.mark.parametrize("code_bits", [1, 3, 5, 8])
def test_odd_row_lengths_pack(n_codes, code_bits, checked):
    """Rows that fill no whole word, down to one code (inputs below 8 elements arrive in constant memory)."""
    codes = random_codes((1, n_codes), 1 << code_bits).astype(mx.uint32)
    words = pack_codes(codes, code_bits, backend="emulator")
    assert same_bits(words, pack_codes(codes, code_bits, backend="reference"))
    assert same_bits(unpack_codes(words, code_bits, n_codes, backend="emulator"), codes.astype(mx.uint8))


def test_packing_reads_and_writes_each_byte_once(checked):
    """A width that divides 32 moves exactly its input and output."""
    pack_codes(random_codes((64, 128), 16), 4, backend="emulator")
    report = checked.launches[-1]
    assert report.traffic("codes").bytes_read == 64 * 128
    assert report.traffic("words").bytes_written == 64 * 128 // 2


@pytest.mark.parametrize("n_trits", [1, 4, 5, 6, 64, 80, 128])
def test_trits_are_packed_and_unpacked_as_defined(n_trits, checked):
    """Bytes equal plain MLX's, which other tests hold against NumPy."""
    trits = random_codes((3, 7, n_trits), 3)
    data = pack_trits(trits, backend="emulator")
    assert same_bits(data, pack_trits(trits, backend="reference"))
    assert same_bits(unpack_trits(data, n_trits, backend="emulator"), trits)
    assert same_bits(unpack_trits(data, n_trits, backend="reference"), trits)


def test_centroids_come_from_kernels_as_from_tables(checked):
    """Unpacked by a kernel and looked up, or several codes to one table lookup: the same centroids."""
    for code_bits, head_dim in ((1, 33), (3, 80), (8, 64)):
        book = TurboQuantMSE(code_bits).codebook(64)
        words = pack_codes(random_codes((2, 3, head_dim), 1 << code_bits), code_bits)
        tables = (book, code_bits, head_dim)
        assert same_bits(decode_words(words, *tables, backend="emulator"), decode_words(words, *tables))
    book = Codebook(np.array([-1.2, 0.0, 1.2]), np.array([-0.6, 0.6]), np.nan)
    data = pack_trits(random_codes((2, 3, 33), 3))
    assert same_bits(decode_trits(data, book, 33, backend="emulator"), decode_trits(data, book, 33))
    assert {report.kernel for report in checked.launches} == {"unpack_codes", "unpack_trits"}


# ---- rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_kernels_rotation_is_the_matrix(head_dim):
    """The chain of butterflies is the matrix that quantizers rotate by on a CPU, and both undo themselves."""
    turn = rotation(head_dim, 0)
    identity = mx.eye(head_dim)
    matrix = np.array(rotate_in_order(identity, turn.signs))
    np.testing.assert_allclose(matrix, np.array(rotation_matrix(head_dim, 0)), atol=1e-6)
    back = unrotate_in_order(rotate_in_order(identity, turn.signs), turn.signs)
    np.testing.assert_allclose(np.array(back), np.eye(head_dim), atol=1e-5)
    np.testing.assert_allclose(np.array(turn.undo(turn.apply(identity))), np.eye(head_dim), atol=1e-5)
    assert set(np.unique(np.array(hadamard_transform(identity)))) == {-1.0, 1.0}


# ---- TurboQuant ----------------------------------------------------------------------------------


@cases(FACTORS)
def test_turboquant_matches_its_definition(code_bits, head_dim, length, dtype, checked):
    """Codes and norms equal plain MLX in the same order, bit for bit, and so does what is decoded from them."""
    tables = (*turboquant_tables(head_dim, code_bits), code_bits)
    x = gaussian((1, 1, length, head_dim), dtype)
    words, norms = rotate_quantize_pack(x, *tables, backend="emulator")
    expected_words, expected_norms = encoded_in_order(x, *tables)
    assert same_bits(words, expected_words)
    assert same_bits(norms, expected_norms)
    decoded = unpack_dequantize_unrotate(words, norms, *tables, dtype, backend="emulator")
    assert same_bits(decoded, decoded_in_order(words, norms, *tables, dtype))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_both_orders_of_sums_nearly_agree(head_dim):
    """A matrix product and butterflies put fewer than 1 code in 10,000 on different sides of a boundary; what one code
    decodes to differs by fp32 rounding."""
    tables = (*turboquant_tables(head_dim, 4), 4)
    x = gaussian((1, 2, 400, head_dim), mx.float16)
    words, norms = rotate_quantize_pack(x, *tables, backend="reference")
    in_order, norms_in_order = encoded_in_order(x, *tables)
    differing = np.array(unpack_codes(words, 4, head_dim)) != np.array(unpack_codes(in_order, 4, head_dim))
    assert differing.mean() < 1e-4
    np.testing.assert_allclose(np.array(norms), np.array(norms_in_order), rtol=2**-10)
    decoded = decoded_in_order(words, norms, *tables, mx.float32)
    expected = unpack_dequantize_unrotate(words, norms, *tables, mx.float32, backend="reference")
    np.testing.assert_allclose(np.array(decoded), np.array(expected), atol=1e-5 * float(mx.max(mx.abs(expected))))


def test_a_zero_vector_decodes_to_zero(checked):
    """Its norm is zero, so whatever its codes are, it comes back as zero."""
    tables = (*turboquant_tables(64, 2), 2)
    words, norms = rotate_quantize_pack(mx.zeros((3, 64)), *tables, backend="emulator")
    assert bool(mx.all(unpack_dequantize_unrotate(words, norms, *tables, backend="emulator") == 0))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_codes_do_not_depend_on_the_schedule(seed, compiler):
    """Any order of threadgroups, simdgroups and lanes gives the same words."""
    tables = (*turboquant_tables(96, 3), 3)
    x = gaussian((9, 96), mx.float16)
    with emulator.session("checked", seed):
        words, _ = rotate_quantize_pack(x, *tables, backend="emulator")
    assert same_bits(words, encoded_in_order(x, *tables)[0])


def test_a_transposed_input_is_encoded_in_row_order(checked):
    """A non-contiguous array gives the codes of its contiguous copy."""
    tables = (*turboquant_tables(64, 4), 4)
    x = gaussian((2, 5, 3, 64), mx.float16)
    words, _ = rotate_quantize_pack(x.transpose(0, 2, 1, 3), *tables, backend="emulator")
    expected, _ = rotate_quantize_pack(x, *tables, backend="emulator")
    assert same_bits(words, mx.contiguous(expected.transpose(0, 2, 1, 3)))


# ---- affine and KIVI -----------------------------------------------------------------------------


@cases(GROUPED)
def test_affine_matches_its_definition(code_bits, head_dim, length, dtype, checked):
    """Codes, scales, zeros and decoded values equal the reference bit for bit, groups along channels."""
    x, group_size = gaussian((2, length, head_dim), dtype), 32  # does not divide 48 and 80
    packed = affine_quantize_pack(x, code_bits, group_size, backend="emulator")
    for ours, expected in zip(packed, affine_quantize_pack(x, code_bits, group_size, backend="reference"), strict=True):
        assert same_bits(ours, expected)
    arguments = (*packed, code_bits, head_dim, group_size, dtype)
    decoded = affine_unpack_dequantize(*arguments, backend="emulator")
    assert same_bits(decoded, affine_unpack_dequantize(*arguments, backend="reference"))


@cases(GROUPED)
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
TURN = hadamard_rotation(mx.ones((64,)))


def levels(code_bits):
    """A codebook of that width."""
    return Codebook(np.arange(1 << code_bits) - 0.5, np.arange((1 << code_bits) - 1) * 1.0, np.nan)


BAD = {
    "width 0": (lambda: pack_codes(CODES, 0), ValueError, r"code_bits must be within 1\.\.8, got 0"),
    "width 9": (lambda: unpack_codes(WORDS, 9, 64), ValueError, "got 9"),
    "half a bit": (lambda: pack_codes(CODES, 0.5), TypeError, "code_bits must be an int, got 0.5"),
    "float codes": (lambda: pack_codes(X, 4), TypeError, "codes must be bool, uint8 or uint32"),
    "too few words": (lambda: unpack_codes(WORDS, 4, 65), ValueError, "fill 9"),
    "int words": (lambda: unpack_codes(WORDS.astype(mx.int32), 4, 64), TypeError, "uint32"),
    "unknown backend": (lambda: pack_codes(CODES, 4, backend="cuda"), ValueError, "'cuda'"),
    "int32 trits": (lambda: pack_trits(CODES.astype(mx.int32)), TypeError, "uint8"),
    "too few bytes": (lambda: unpack_trits(CODES, 1000), ValueError, "fill 200"),
    "int8 values": (lambda: rotate_quantize_pack(CODES, TURN, levels(1), 1), TypeError, "x must be float16"),
    "head_dim 72": (lambda: hadamard_rotation(mx.ones((72,))), ValueError, "20, got 72"),
    "signs": (lambda: hadamard_rotation(mx.ones((64,), mx.float16)), ValueError, r"signs .* \(64,\)"),
    "rotation": (lambda: rotate_quantize_pack(X[:, :32], TURN, levels(1), 1), ValueError, "x's 32 values .* of 64"),
    "codebook": (lambda: rotate_quantize_pack(X, TURN, levels(3), 2), ValueError, "4 centroids and 3 boundaries"),
    "norms": (lambda: unpack_dequantize_unrotate(WORDS, NORMS[:1], TURN, levels(4), 4), ValueError, "norms"),
    "result dtype": (
        lambda: unpack_dequantize_unrotate(WORDS, NORMS, TURN, levels(4), 4, mx.int32), TypeError, "dtype"),
    "group": (lambda: affine_quantize_pack(X, 4, 0), ValueError, "group_size must be a positive integer, got 0"),
    "block": (lambda: kivi_quantize_pack(mx.zeros((2, 33, 64)), 4, 32), ValueError, "number of tokens, 33"),
    "scales": (
        lambda: affine_unpack_dequantize(WORDS, NORMS, NORMS, 4, 64, 32), ValueError, r"scales .* \(2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, error, message):
    """Each wrong argument is named with its value and the rule."""
    with pytest.raises(error, match=message):
        call()


NO_ROWS = r"at least one element, got shape \(0, "
UNSERVED = {
    "pack_codes": (lambda **b: pack_codes(CODES[:0], 4, **b), NO_ROWS),
    "unpack_codes": (lambda **b: unpack_codes(WORDS[:0], 4, 64, **b), NO_ROWS),
    "decode_words": (lambda **b: decode_words(WORDS[:0], levels(4), 4, 64, **b), NO_ROWS),
    "pack_trits": (lambda **b: pack_trits(CODES[:0], **b), NO_ROWS),
    "unpack_trits": (lambda **b: unpack_trits(CODES[:0], 320, **b), NO_ROWS),
    "decode_trits": (lambda **b: decode_trits(CODES[:0], levels(1), 320, **b), NO_ROWS),
    "rotate_quantize_pack": (lambda **b: rotate_quantize_pack(X[:0], TURN, levels(4), 4, **b)[0], NO_ROWS),
    "unpack_dequantize_unrotate": (
        lambda **b: unpack_dequantize_unrotate(WORDS[:0], NORMS[:0], TURN, levels(4), 4, **b), NO_ROWS),
    "affine_quantize_pack": (lambda **b: affine_quantize_pack(X[:0], 4, 32, **b)[0], NO_ROWS),
    "kivi_quantize_pack": (lambda **b: kivi_quantize_pack(X[:0], 4, 32, **b)[0], NO_ROWS),
    "affine_unpack_dequantize": (
        lambda **b: affine_unpack_dequantize(WORDS[:0], NORMS[:0], NORMS[:0], 4, 64, 64, **b), NO_ROWS),
    "head_dim 1024": (
        lambda **b: rotate_quantize_pack(mx.zeros((2, 1024)), rotation(1024, 0), levels(1), 1, **b)[0],
        "threadgroup memory, got 1024"),
    "no Hadamard rotation": (
        lambda **b: rotate_quantize_pack(X, Rotation(mx.eye(64)), levels(1), 1, **b)[0], "Hadamard transform alone"),
    "affine, head_dim 1024": (
        lambda **b: affine_quantize_pack(mx.zeros((2, 1024)), 4, 32, **b)[0], "at most 512 .* got 1024"),
    "large block": (lambda **b: kivi_quantize_pack(mx.zeros((256, 256)), 4, 256, **b)[0], r"got 256 \* 256"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), UNSERVED.values(), ids=UNSERVED)
def test_what_no_kernel_serves_is_refused_where_one_is_named(call, message, compiler):
    """A named backend is never changed in silence; where none is named, plain MLX does it, in any surroundings."""
    with pytest.raises(ValueError, match=message):
        call(backend="emulator")
    expected = call(backend="reference")
    with use_backend("emulator"):
        assert same_bits(call(), expected)


def test_a_backend_holds_for_a_block_and_a_named_one_before_it(monkeypatch):
    """Without a name: that of the innermost block, and outside Metal where it can run."""
    assert launches_on(None) is None or resolve_backend(None) == "metal"
    with use_backend("emulator"):
        assert launches_on(None) == "emulator"
        assert launches_on(None, "too large") is None
        assert launches_on("reference") is None
        with use_backend("reference"):
            assert launches_on(None) is None
        assert launches_on(None) == "emulator"
        with pytest.raises(ValueError, match="too large"):
            launches_on("emulator", None, "too large")
    with pytest.raises(ValueError, match="'cuda'"), use_backend("cuda"):
        pass


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
    rotate_quantize_pack(X, TURN, levels(4), 4, backend="emulator")
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
