"""Check every kernel on this machine against its definition in plain MLX.

``verify()`` runs small cases that reach every line of every body: where Metal is MLX's default device the bodies as
they ship, elsewhere through the CPU emulator, which also looks for races, out-of-bounds accesses and uninitialised
reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from veloxquant_kernels import emulator
from veloxquant_kernels.affine import affine_quantize_pack, affine_unpack_dequantize, kivi_quantize_pack
from veloxquant_kernels.codebook import Codebook, boundaries_array, centroids_array
from veloxquant_kernels.fused_attention import (
    PackedSide,
    decode_side,
    fused_attention,
    fused_attention_reference,
)
from veloxquant_kernels.kernel import Backend, resolve_backend, why_no_metal
from veloxquant_kernels.packing import pack_codes, pack_trits, unpack_codes, unpack_trits
from veloxquant_kernels.rans_decode import rans_decode
from veloxquant_kernels.rans_format import INACTIVE, Tables, rans_encode_reference
from veloxquant_kernels.rotation import Rotation, hadamard_rotation, rotate_in_order
from veloxquant_kernels.turboquant import (
    decode_in_order,
    encode_in_order,
    root_mean_square_in_order,
    rotate_quantize_pack,
    unpack_dequantize_unrotate,
)

ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}
"""Relative error of rounding a result once to a dtype."""

SLACK = 8
"""Standard deviations of rounding error that bound it, rotation and exp included."""


@dataclass(frozen=True)
class Outcome:
    """One case on one backend.

    Args:
        kernel: stem of the body.
        case: what was run.
        backend: where.
        error: largest error relative to its bound; codes and decoded values have bound 0, so 0 or infinity.
        detail: the fault, where there was one.
    """

    kernel: str
    case: str
    backend: Backend
    error: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= 1


@dataclass(frozen=True)
class KernelResult:
    """All cases of one kernel on one backend.

    Args:
        kernel: stem of the body.
        backend: where it ran.
        n_cases: how many cases.
        error: the largest error relative to its bound; 0 says that every bit agreed.
        failures: the outcomes beyond their bound.
    """

    kernel: str
    backend: Backend
    n_cases: int
    error: float
    failures: tuple[Outcome, ...]


def by_kernel(outcomes: Sequence[Outcome]) -> list[KernelResult]:
    """The outcomes of :func:`verify`, kernel by kernel in the order of their first case."""
    groups: dict[tuple[str, Backend], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.kernel, outcome.backend), []).append(outcome)
    return [
        KernelResult(*key, len(group), max(o.error for o in group), tuple(o for o in group if not o.passed))
        for key, group in groups.items()
    ]


@dataclass(frozen=True)
class Case:
    """A named comparison; ``run`` returns the error relative to its bound."""

    kernel: str
    name: str
    run: Callable[[Backend], float]


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Whether two arrays agree in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[a.dtype.size]
    return bool(mx.array_equal(a.view(unsigned), b.view(unsigned)))


def attention_error(
    out: mx.array,
    queries: mx.array,
    keys: PackedSide,
    values: PackedSide,
    n_packed: int,
    scale: float,
    mask: mx.array | None = None,
) -> float:
    """Largest error of fused attention relative to its bound.

    With rounding errors of random sign, an fp32 sum of products errs by about u |q| |k| (u = 2^-24, whatever its
    length), as does each stage of the rotation: SLACK times that bounds a score's error. It moves the score's weight
    by as much, relatively, and the output by at most twice that times the largest value; exp and the sum over tokens
    add SLACK u of it. The result is rounded once to the queries' dtype.

    The exact side is computed on the CPU: on recent Apple GPUs MLX multiplies fp32 matrices in TF32.

    Source: Higham & Mary, Sharper probabilistic backward error analysis, SIAM J. Sci. Comput. 42 (2020).
    """

    def length(x: mx.array) -> mx.array:
        return mx.max(mx.sqrt(mx.sum(mx.square(x), axis=-1)))

    with mx.stream(mx.cpu):
        exact = fused_attention_reference(queries.astype(mx.float32), keys, values, n_packed, scale, mask)
        decoded_keys, decoded_values = (decode_side(side, n_packed) for side in (keys, values))
        score_error = SLACK * ROUNDING[mx.float32] * length(queries.astype(mx.float32)) * length(decoded_keys) * scale
        bound = ROUNDING[queries.dtype] * mx.abs(exact)
        bound = bound + (2 * score_error + SLACK * ROUNDING[mx.float32]) * mx.max(mx.abs(decoded_values))
        error = mx.abs(out.astype(mx.float32) - exact) / bound
        return float(mx.max(mx.where(mx.isnan(error), mx.inf, error)))


def _normal(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x[..., 1] *= 6  # an outlier channel, as keys have
    return mx.array(x).astype(dtype)


def _codes(shape: tuple[int, ...], levels: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, levels, shape).astype(np.uint8))


def _tables(head_dim: int, code_bits: int, seed: int) -> tuple[mx.array, Rotation, Codebook]:
    """Signs, their rotation and ascending centroids: any will do to compare arithmetic."""
    rng = np.random.default_rng([seed, head_dim, code_bits])
    signs = mx.array(rng.choice(np.array([-1, 1], np.float32), head_dim))
    centroids = np.sort(rng.standard_normal(1 << code_bits))
    return signs, hadamard_rotation(signs), Codebook(centroids, (centroids[1:] + centroids[:-1]) / 2, np.nan)


def _exact(
    kernel: str,
    name: str,
    call: Callable[[Backend], Sequence[mx.array]],
    defined: Callable[[], Sequence[mx.array]] | None = None,
) -> Case:
    """The kernel writes the bits that plain MLX computes, or those of ``defined``."""

    def run(backend: Backend) -> float:
        with mx.stream(mx.cpu):  # the definition, whatever device the kernel runs on
            expected = call("reference") if defined is None else defined()
        pairs = zip(call(backend), expected, strict=True)
        return 0.0 if all(same_bits(a, b) for a, b in pairs) else float("inf")

    return Case(kernel, name, run)


def _packing(code_bits: int, n_codes: int) -> Iterator[Case]:
    codes = _codes((3, n_codes), 256, code_bits)  # the kernel drops bits above the width
    allowed = codes & ((1 << code_bits) - 1)
    words = pack_codes(allowed, code_bits, backend="reference")
    name = f"{code_bits} bits, rows of {n_codes}"
    given = {"reference": allowed, "metal": codes, "emulator": codes}
    yield _exact("pack_codes", name, lambda b: [pack_codes(given[b], code_bits, backend=b)])
    yield _exact("unpack_codes", name, lambda b: [unpack_codes(words, code_bits, n_codes, backend=b)])


def _trits(n_trits: int) -> Iterator[Case]:
    trits = _codes((3, n_trits), 3, n_trits)
    data = pack_trits(trits, backend="reference")
    yield _exact("pack_trits", f"rows of {n_trits}", lambda b: [pack_trits(trits, backend=b)])
    yield _exact("unpack_trits", f"rows of {n_trits}", lambda b: [unpack_trits(data, n_trits, backend=b)])


def _turboquant(code_bits: int, head_dim: int, dtype: mx.Dtype) -> Iterator[Case]:
    signs, rotation, codebook = _tables(head_dim, code_bits, 1)
    edges, centroids = boundaries_array(codebook), centroids_array(codebook)
    x = _normal((7, head_dim), 2, dtype)
    x[4] = 0
    words, norms = encode_in_order(x, signs, edges, code_bits)
    name = f"{code_bits} bits, head_dim {head_dim}, {str(dtype).split('.')[-1]}"
    yield _exact(
        "rotate_quantize_pack",
        name,
        lambda b: rotate_quantize_pack(x, rotation, codebook, code_bits, backend=b),
        lambda: encode_in_order(x, signs, edges, code_bits),
    )
    yield _exact(
        "unpack_dequantize_unrotate",
        name,
        lambda b: [unpack_dequantize_unrotate(words, norms, rotation, codebook, code_bits, dtype, backend=b)],
        lambda: [decode_in_order(words, norms, centroids, signs, code_bits, dtype)],
    )


def _last_bits(head_dim: int, n_rows: int) -> Case:
    """Each value of a row lies between two edges of its own, one ulp apart: an error in its last bit changes its code.

    Such an error in the norm, as from a sum in another order, survives rounding in some rows only: hence several.
    """
    signs, rotation, _ = _tables(head_dim, 8, 1)
    x = _normal((n_rows, head_dim), 8)
    with mx.stream(mx.cpu):
        rotated = np.array(rotate_in_order(x * (1 / root_mean_square_in_order(x)), signs))

    def beside(row: int) -> Codebook:
        values = np.unique(rotated[row])
        pairs = np.stack([np.nextafter(values, np.float32(-np.inf)), values], axis=1).reshape(-1)
        return Codebook(np.zeros(256), np.pad(pairs, (0, 255 - pairs.size), constant_values=np.inf), np.nan)

    rows = [(x[row : row + 1], beside(row)) for row in range(n_rows)]

    def encode(backend: Backend) -> list[mx.array]:
        return [a for row, book in rows for a in rotate_quantize_pack(row, rotation, book, 8, backend=backend)]

    def defined() -> list[mx.array]:
        return [a for row, book in rows for a in encode_in_order(row, signs, boundaries_array(book), 8)]

    name = f"8 bits, head_dim {head_dim}, float32, edges beside the values"
    return _exact("rotate_quantize_pack", name, encode, defined)


def _affine(code_bits: int, head_dim: int, group_size: int, dtype: mx.Dtype, per_channel: bool) -> Iterator[Case]:
    quantize = kivi_quantize_pack if per_channel else affine_quantize_pack
    x = _normal((2, 2 * group_size if per_channel else 3, head_dim), 3, dtype)
    x[0, :, 2] = 7.25  # a constant group of a channel
    packed = quantize(x, code_bits, group_size, backend="reference")
    name = f"{code_bits} bits, head_dim {head_dim}, groups of {group_size}, {str(dtype).split('.')[-1]}"
    yield _exact(quantize.__name__, name, lambda b: quantize(x, code_bits, group_size, backend=b))
    lost = x + 0
    lost[1, 1, 0] = float("inf")

    def lost_group(backend: Backend) -> list[mx.array]:  # its scale is NaN, of which there are several patterns of bits
        codes, scales, zeros = quantize(lost, code_bits, group_size, backend=backend)
        return [codes, mx.isnan(scales), mx.where(mx.isnan(scales), 0, scales), zeros]

    yield _exact(quantize.__name__, f"{name}, one value infinite", lost_group)

    def dequantize(backend: Backend) -> list[mx.array]:
        arguments = (*packed, code_bits, head_dim, group_size, dtype)
        return [affine_unpack_dequantize(*arguments, per_channel=per_channel, backend=backend)]

    kind = "per channel" if per_channel else "per token"
    yield _exact("affine_unpack_dequantize", f"{name}, {kind}", dequantize)


def _attention(
    bits: tuple[int, int],
    head_dim: int,
    group: int,
    n_packed: int,
    dtype: mx.Dtype,
    *,
    n_sinks: int = 0,
    n_tail: int = 0,
    mask: str = "no",
    split_tokens: int | None = 32,
    n_batch: int = 2,
    n_kv_heads: int = 2,
    spread: float = 1.0,
    n_hidden: int = 32,
) -> Case:
    def side(code_bits: int, seed: int) -> PackedSide:
        signs, _, codebook = _tables(head_dim, code_bits, seed)
        x = _normal((n_batch, n_kv_heads, n_packed + 3, head_dim), seed)
        words, norms = encode_in_order(x, signs, boundaries_array(codebook), code_bits)
        norms[:, :, n_packed:] = float("nan")  # slots that are not in use
        plain = [
            _normal((n_batch, n_kv_heads, n, head_dim), seed + n, mx.float16) if n else None for n in (n_sinks, n_tail)
        ]
        return PackedSide(words, norms, centroids_array(codebook), signs, code_bits, *plain)

    keys, values = side(bits[0], 4), side(bits[1], 5)
    queries = _normal((n_batch, n_kv_heads * group, 1, head_dim), 6, dtype)
    visible = np.random.default_rng(7).random((n_batch, 1, 1, n_packed + n_sinks + n_tail)) < 0.7
    visible[0, ..., :n_hidden] = False  # whole tiles that one sequence does not see
    visible[2:] = False  # a sequence that sees nothing
    masks = {"no": None, "bool": mx.array(visible), "additive": mx.array(np.where(visible, 0.25, -1e4)).astype(dtype)}
    scale = spread * head_dim**-0.5

    def run(backend: Backend) -> float:
        out = fused_attention(
            queries,
            keys,
            values,
            n_packed,
            scale=scale,
            mask=masks[mask],
            split_tokens=split_tokens,
            backend=backend,
        )
        return attention_error(out, queries, keys, values, n_packed, scale, masks[mask])

    name = (
        f"K{bits[0]}V{bits[1]}, head_dim {head_dim}, {group} queries a head, {n_sinks} + {n_packed} + {n_tail} tokens, "
        f"{mask} mask, scores x {spread:g}, {str(dtype).split('.')[-1]}"
    )
    return Case("fused_attention", name, run)


def cases() -> Iterator[Case]:
    """The cases, kernel by kernel."""
    for code_bits, n_codes in ((1, 33), (3, 65), (4, 64), (5, 7), (8, 80)):
        yield from _packing(code_bits, n_codes)
    for n_trits in (3, 5, 64):
        yield from _trits(n_trits)
    yield from _turboquant(1, 64, mx.float16)
    yield from _turboquant(3, 48, mx.bfloat16)
    yield from _turboquant(8, 80, mx.float32)
    yield from _turboquant(5, 256, mx.bfloat16)
    yield from _affine(4, 80, 32, mx.float16, per_channel=False)
    yield from _affine(5, 256, 64, mx.bfloat16, per_channel=False)
    yield from _affine(3, 64, 9, mx.float32, per_channel=False)
    yield from _affine(2, 80, 5, mx.bfloat16, per_channel=True)
    yield from _affine(7, 48, 8, mx.float32, per_channel=True)
    yield _attention((4, 2), 64, 3, 70, mx.float16, n_sinks=4, n_tail=9)
    yield _attention((3, 5), 48, 5, 65, mx.float32, mask="bool", n_tail=3)
    yield _attention((8, 1), 80, 1, 64, mx.bfloat16, n_sinks=2, mask="additive")
    yield _attention((2, 3), 64, 3, 1100, mx.float32, n_batch=1, n_kv_heads=1)
    yield _attention(
        (4, 4), 256, 2, 97, mx.float32, n_tail=40, spread=30, split_tokens=128
    )  # scores far beyond exp's range
    yield _attention((1, 8), 128, 4, 33, mx.float32, n_sinks=33, n_tail=31, mask="bool", split_tokens=None, n_batch=3)
    # more splits than lanes, of which only the last sees a token
    yield _attention((2, 2), 64, 1, 1070, mx.float32, mask="bool", n_hidden=1056, n_batch=1, n_kv_heads=1)
    # threadgroup memory within 88 bytes of its limit
    yield _attention((1, 8), 32, 39, 40, mx.float16, n_batch=1, n_kv_heads=1)
    yield _last_bits(80, n_rows=8)
    yield from _entropy((32, 5, 70, 1, 33, 32), 9, n_contexts=1, precision=12)
    yield from _entropy((32, 40, 3, 2, 31, 96), 14, n_contexts=3, precision=15, half=1)
    yield from _entropy((64, 7, 32, 9, 1, 20), 12, n_contexts=5, precision=12, half=12)


def entropy_tables(n_coefficients: int, n_contexts: int, precision: int, half: int, seed: int) -> Tables:
    """Tables of geometric frequencies, one symbol without any, and a class, low bits or none for each coefficient."""
    rng = np.random.default_rng(seed)
    scales, k = np.geomspace(0.3, 4, 5), np.abs(np.arange(-half, half + 1))
    p = np.concatenate([np.exp(-k / scales[:, None]), np.full((5, 1), 0.02)], axis=1)
    frequencies = np.floor(p / p.sum(axis=1, keepdims=True) * ((1 << precision) - 2 * half - 2)).astype(np.int64) + 1
    frequencies[0, 0] = 0
    frequencies[:, half] += (1 << precision) - frequencies.sum(axis=1)
    cumulative = np.concatenate([np.zeros((5, 1), np.int64), np.cumsum(frequencies, axis=1)], axis=1)
    classes = rng.integers(0, 4, n_coefficients)
    classes[2] = INACTIVE
    return Tables(
        classes=classes.astype(np.uint16),
        shifts=rng.choice(np.array([0, 0, 3, 16], np.uint8), n_coefficients),
        cumulative=cumulative.astype(np.uint16),
        class_tables=rng.integers(0, 5, (4, n_contexts)).astype(np.uint16),
        weights=np.array([700, 256, 64, 9], np.uint16),
        contexts=(np.arange(256) * n_contexts // 256).astype(np.uint8),
        precision=precision,
    )


def _entropy(
    lengths: Sequence[int], n_coefficients: int, n_contexts: int, precision: int, half: int = 5
) -> Iterator[Case]:
    tables = entropy_tables(n_coefficients, n_contexts, precision, half, seed=9)
    rng = np.random.default_rng(10)
    records = []
    for length in lengths:
        symbols = np.rint(rng.standard_normal((length, n_coefficients)) * rng.choice([0.3, 3.0], (length, 1)))
        wild = rng.random(symbols.shape) < 0.03
        symbols[wild] = (rng.integers(-(2**31), 2**31, wild.sum()) >> rng.integers(0, 31, wild.sum())).astype(float)
        symbols[:, tables.classes == INACTIVE] = 0
        symbols[0, 0] = -(2.0**31)
        records += rans_encode_reference(symbols.astype(np.int32), tables, 256)

    def decode(name: str, words: Sequence[np.ndarray], with_symbols: bool) -> Case:
        starts = np.cumsum([0, *map(len, words)]).astype(np.uint32)
        tokens = np.cumsum([0, *lengths]).astype(np.uint32)
        packed, begins, counts = (mx.array(array) for array in (np.concatenate(words), starts, tokens))

        def call(backend: Backend) -> tuple[mx.array, ...]:
            symbols, status = rans_decode(packed, begins, counts, tables, backend=backend)
            return (symbols, status) if with_symbols else (status,)

        return _exact("rans_decode", name, call)

    name = (
        f"blocks of {', '.join(map(str, lengths))} tokens, {n_coefficients} coefficients, "
        f"{n_contexts} contexts, {precision} bits"
    )
    yield decode(name, records, True)
    # each block damaged in a way of its own, the last one too short: what is behind it is no word of anybody's
    wrong = [record.copy() for record in records]
    damages: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda record: record[: 2 * min(32, int(record[0]) + 1)],
        lambda record: np.concatenate([record[:1] + 1, record[1:]]).astype(np.uint16),
        lambda record: np.concatenate([record[:1], record[1:2], [0], record[3:]]).astype(np.uint16),
        lambda record: record[:-1],
        lambda record: np.concatenate([record[:1], rng.integers(0, 1 << 16, len(record) - 1)]).astype(np.uint16),
        lambda record: np.concatenate([record, record[-1:]]),
    ]
    for i, record in enumerate(wrong):
        wrong[i] = damages[(len(wrong) - 1 - i) % len(damages)](record)
    yield decode(f"{name}, damaged", wrong, False)


def default_backend() -> Backend:
    """Where kernels are verified on this machine: Metal if it can run, else the emulator."""
    return "metal" if why_no_metal() is None else "emulator"


def verify(
    backend: Backend | None = None, seed: int = 1, before: Callable[[Case], None] = lambda _: None
) -> list[Outcome]:
    """Run every case.

    Args:
        backend: ``"metal"`` or ``"emulator"``; None takes :func:`default_backend`.
        seed: scheduling order of the emulator.
        before: is told of each case before it runs (the first run compiles the bodies, which takes a minute).

    Returns:
        One outcome a case, in order; a fault of the emulator or of Metal's compiler is an outcome, not an exception.

    Raises:
        CompilerNotFound: the emulator has no compiler.
        RuntimeError: ``backend="metal"`` where Metal cannot run.
        ValueError: ``backend="reference"``, which is what the kernels are compared with.
    """
    backend = default_backend() if backend is None else resolve_backend(backend)
    if backend == "reference":
        raise ValueError("backend must be 'metal' or 'emulator': the reference is what kernels are compared with")
    if backend == "emulator":
        emulator.find_compiler()
    outcomes = []
    for case in cases():
        before(case)
        outcomes.append(run_case(case, backend, seed))
    return outcomes


def run_case(case: Case, backend: Backend, seed: int = 1) -> Outcome:
    """Run one case; see :func:`verify`."""
    outcome = Outcome(case.kernel, case.name, backend, float("inf"))
    scope = emulator.session("checked", seed) if backend == "emulator" else contextlib.nullcontext()
    with scope:
        try:
            return replace(outcome, error=case.run(backend))
        except (RuntimeError, ValueError) as fault:  # MLX refuses a launch on the wrong device with a ValueError
            return replace(outcome, detail=str(fault))
