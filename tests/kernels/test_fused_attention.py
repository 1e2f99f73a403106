"""Fused decode attention: the executed ``.metal`` bodies against plain attention over the decoded cache."""

import dataclasses
import itertools

import mlx.core as mx
import numpy as np
import pytest
from covering import pairwise

from veloxquant_kernels import emulator
from veloxquant_kernels.fused_attention import (
    PackedSide,
    default_split_tokens,
    fused_attention,
    fused_attention_reference,
    threadgroup_bytes,
    unsupported,
)
from veloxquant_kernels.traffic import decode_traffic
from veloxquant_kernels.verify import attention_error
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.transforms.rotation import rotation

pytestmark = pytest.mark.usefixtures("compiler")


def packed_side(rng, n_batch, n_kv_heads, slots, head_dim, code_bits, n_sinks=0, n_tail=0, seed=0):
    """A side as the cache holds it, from the quantizer's own encoding; an outlier channel, as keys have."""
    quantizer = TurboQuantMSE(code_bits, seed)

    def tokens(n):
        x = rng.standard_normal((n_batch, n_kv_heads, n, head_dim)).astype(np.float16)
        x[..., 5] *= 8
        return mx.array(x)

    words, norms = quantizer.encode(tokens(slots)).arrays
    centroids = mx.array(quantizer.codebook(head_dim).centroids.astype(np.float32))
    plain = [tokens(n) if n else None for n in (n_sinks, n_tail)]
    return PackedSide(words, norms, centroids, rotation(head_dim, seed).signs, code_bits, *plain)


def make_queries(rng, n_batch, n_heads, head_dim, dtype=mx.float32):
    return mx.array(rng.standard_normal((n_batch, n_heads, 1, head_dim)).astype(np.float32)).astype(dtype)


PLAIN = [(0, 0), (4, 0), (0, 32), (4, 45)]
FACTORS = {
    "key_bits": list(range(1, 9)),
    "value_bits": list(range(1, 9)),
    "head_dim": [48, 64, 80, 96, 128, 256],
    "length": [1, 3, 31, 33, 1000],
    "dtype": [mx.float16, mx.bfloat16, mx.float32],
    "group": [1, 3, 4, 7],
    "plain": PLAIN,
    "mask": ["none", "bool", "float"],
}
COVERING = pairwise(FACTORS)


def random_rows(n, seed):
    rng = np.random.default_rng(seed)
    return [tuple(v[int(rng.integers(len(v)))] for v in FACTORS.values()) for _ in range(n)]


# the full product has 414,720 cases: the marked run takes 600 of them by seed, and the product of widths (keys' and
# values' the same), head sizes, lengths and dtypes whole, the other factors in turn
SAMPLE = [pytest.param(*row, marks=pytest.mark.slow) for row in random_rows(600, seed=1)]
OTHERS = list(itertools.product(*(FACTORS[name] for name in ("group", "plain", "mask"))))
PRODUCT = list(itertools.product(*(FACTORS[name] for name in ("key_bits", "head_dim", "length", "dtype"))))
WHOLE = [
    pytest.param(code_bits, code_bits, *rest, *OTHERS[i % len(OTHERS)], marks=pytest.mark.slow)
    for i, (code_bits, *rest) in enumerate(PRODUCT)
]


def test_the_marked_run_holds_the_whole_product():
    """8 widths x 6 head sizes x 5 lengths x 3 dtypes = 720, each once; every group, sinks and tail, mask among them."""
    assert len({row.values[:5] for row in WHOLE}) == len(WHOLE) == 8 * 6 * 5 * 3
    assert {row.values[5:] for row in WHOLE} == set(OTHERS)


@pytest.mark.parametrize(tuple(FACTORS), [*COVERING, *SAMPLE, *WHOLE])
def test_fused_attention_matches_its_definition(key_bits, value_bits, head_dim, length, dtype, group, plain, mask):
    """Every pair of widths, head sizes, lengths, dtypes, groups, sinks and tails, masks: within the fp32 bound."""
    rng = np.random.default_rng(0)
    n_batch, n_kv_heads = (2, 1) if length < 1000 else (1, 1)
    shape = (rng, n_batch, n_kv_heads, length + 2, head_dim)
    keys = packed_side(*shape, key_bits, *plain, seed=3)
    values = packed_side(*shape, value_bits, *plain, seed=4)
    queries = make_queries(rng, n_batch, n_kv_heads * group, head_dim, dtype)
    n_tokens = length + sum(plain)
    hidden = rng.random((n_batch, 1, 1, n_tokens)) < 0.3
    hidden[..., 0] = False
    masks = {"none": None, "bool": mx.array(~hidden), "float": mx.array(np.where(hidden, -1e4, 0.5)).astype(dtype)}
    with emulator.session("checked", seed=11) as record:
        out = fused_attention(
            queries, keys, values, length, scale=head_dim**-0.5, mask=masks[mask],
            split_tokens=None if length < 1000 else 320, backend="emulator",
        )  # fmt: skip
    assert out.dtype == dtype
    assert attention_error(out, queries, keys, values, length, head_dim**-0.5, masks[mask]) <= 1
    assert record.launches[0].threadgroup_memory == threadgroup_bytes(head_dim, group, key_bits, value_bits)


def small(n_packed=100, n_sinks=0, n_tail=0, n_batch=1, n_kv_heads=2, group=2, head_dim=64, bits=(4, 3), slots=None):
    rng = np.random.default_rng(5)
    shape = (rng, n_batch, n_kv_heads, slots or max(1, n_packed), head_dim)
    keys = packed_side(*shape, bits[0], n_sinks, n_tail, seed=1)
    values = packed_side(*shape, bits[1], n_sinks, n_tail, seed=2)
    return make_queries(rng, n_batch, n_kv_heads * group, head_dim), keys, values, n_packed


def run(case, mode="checked", seed=0, **options):
    with emulator.session(mode, seed):
        return fused_attention(*case, scale=0.125, backend="emulator", **options)


@pytest.mark.parametrize("split_tokens", [32, 64, 96, 128, 4096])
def test_splits_do_not_change_the_result(split_tokens):
    """One split or many, ending on and beside tile boundaries, with sinks and tail."""
    case = small(n_packed=129, n_sinks=33, n_tail=40)
    out = run(case, split_tokens=split_tokens)
    assert attention_error(out, *case, 0.125) <= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["checked", "fast"])
def test_the_schedule_does_not_change_a_bit(seed, mode):
    """Any order of threadgroups, simdgroups and lanes gives the same output."""
    case = small(n_packed=70, n_sinks=4, n_tail=9)
    assert bool(mx.array_equal(run(case, mode, seed, split_tokens=32), run(case, mode, 99, split_tokens=32)))


def test_a_hundred_and_twenty_eight_thousand_tokens():
    """The longest context: as many splits as the traffic allows, within the same bound."""
    case = small(n_packed=131072, n_kv_heads=1, group=1, bits=(2, 2))
    assert attention_error(run(case, "fast"), *case, 0.125) <= 1


def test_only_uncompressed_tokens():
    """A cache whose tokens all lie in sinks and tail."""
    case = small(n_packed=0, n_sinks=2, n_tail=5)
    assert attention_error(run(case), *case, 0.125) <= 1


def test_slots_beyond_the_tokens_are_not_read():
    """Buffers grow ahead; poisoning the unused slots changes nothing."""
    queries, keys, values, n_packed = small(n_packed=50, slots=80)
    expected = run((queries, keys, values, n_packed))

    def poisoned(side):
        norms = mx.array(np.where(np.arange(80)[:, None] < n_packed, np.array(side.norms), np.float16(np.nan)))
        return dataclasses.replace(side, norms=norms)

    assert bool(mx.array_equal(run((queries, poisoned(keys), poisoned(values), n_packed)), expected))


def test_batches_and_heads_are_independent():
    """Each sequence and KV head of a batch gives what it gives alone."""
    queries, keys, values, n_packed = small(n_packed=40, n_tail=3, n_batch=2, n_kv_heads=2)
    whole = run((queries, keys, values, n_packed))

    def part(side, b, h):
        arrays = {name: getattr(side, name)[b : b + 1, h : h + 1] for name in ("words", "norms", "tail")}
        return dataclasses.replace(side, **arrays)

    for b in range(2):
        for h in range(2):
            heads = queries[b : b + 1, 2 * h : 2 * h + 2]
            alone = run((heads, part(keys, b, h), part(values, b, h), n_packed))
            assert bool(mx.array_equal(alone, whole[b : b + 1, 2 * h : 2 * h + 2]))


def test_a_mask_removes_tokens():
    """Hiding the first tokens equals a cache without them."""
    queries, keys, values, n_packed = small(n_packed=64)
    mask = mx.arange(64).reshape(1, 1, 1, 64) >= 32
    masked = run((queries, keys, values, n_packed), mask=mask)

    def rest(side):
        return dataclasses.replace(side, words=side.words[:, :, 32:], norms=side.norms[:, :, 32:])

    np.testing.assert_allclose(np.array(masked), np.array(run((queries, rest(keys), rest(values), 32))), atol=1e-6)


def test_a_fully_hidden_cache_gives_zeros():
    """No visible token: zeros, not NaN."""
    case = small(n_packed=64, n_tail=3)
    out = run(case, mask=mx.zeros((1, 1, 1, 67), mx.bool_))
    assert bool(mx.all(out == 0))
    assert bool(mx.all(fused_attention_reference(*case, 0.125, mx.zeros((1, 1, 1, 67), mx.bool_)) == 0))


def test_large_scores_do_not_overflow():
    """Scores of several hundred: the online softmax subtracts the running maximum."""
    queries, keys, values, n_packed = small(n_packed=100)
    out = run((queries * 300, keys, values, n_packed), split_tokens=32)
    assert bool(mx.all(mx.isfinite(out)))
    assert attention_error(out, queries * 300, keys, values, n_packed, 0.125) <= 1


# ---- traffic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "group", "bits", "masked"),
    [
        *itertools.product((64,), (3,), (2, 3, 4, 8), (False, True)),
        *((128, g, b, True) for g in (4, 8) for b in (2, 8)),
    ],
)
def test_traffic(head_dim, group, bits, masked, record_property):
    """At 4k tokens packed bytes are read exactly once, and all else, a bool mask too, is at most a tenth of them."""
    traffic = decode_traffic(4096, head_dim, group, bits, bits, masked=masked)
    assert traffic.packed_nbytes == 4096 * 2 * (head_dim * bits // 8 + 2)
    record_property("packed reads", f"{traffic.packed_reads:.3f}x")
    record_property("all other traffic", f"{traffic.overhead:.1%}")
    assert traffic.packed_reads == 1.0
    assert traffic.overhead <= 0.10
    names = {item.name for item in traffic.items}
    assert {"partial_values", "partial_stats", "queries", "key_signs", "key_centroids", "value_centroids"} <= names
    assert ("mask" in names) == masked
    assert sum(traffic.overhead_by_kind.values()) == pytest.approx(traffic.overhead, rel=1e-12)


def test_large_groups_cost_more():
    """16 queries per KV head at 2 bits with a mask: 13.5% beside the packed bytes, 3.1% of it signs."""
    traffic = decode_traffic(4096, 128, 16, 2, 2, masked=True)
    assert traffic.packed_reads == 1.0
    assert round(traffic.overhead, 3) == 0.135
    assert round(traffic.overhead_by_kind["signs"], 3) == 0.031


def test_traffic_counts_both_passes():
    """One split: each partial row is written once and read once, the output written once."""
    items = {item.name: item for item in decode_traffic(64, 64, 2, 4, 4).items}
    rows = 2 * 64 * 4
    assert (items["partial_values"].bytes_written, items["partial_values"].bytes_read) == (rows, rows)
    assert (items["out"].bytes_written, items["queries"].bytes_read) == (rows // 2, rows // 2)
    assert items["value_signs"].bytes_read == 2 * 64 * 4


def test_split_size_weighs_traffic_against_parallelism():
    """Longer caches get more splits; their size is a multiple of the tile."""
    splits = []
    for n_packed in (1, 100, 4096, 32768, 131072):
        size = default_split_tokens(n_packed, 128, 4, 4, 4, 2)
        assert size % 32 == 0
        splits.append(-(-n_packed // size))
    assert splits == sorted(splits)
    assert splits[0] == 1
    assert splits[-1] > 64


# ---- bad input ----------------------------------------------------------------------------------

QUERIES, KEYS, VALUES, _ = small(n_packed=8)
TAIL = mx.zeros((1, 2, 3, 64), mx.float16)


def replaced(side, **changes):
    return dataclasses.replace(side, **changes)


BAD = {
    "empty": (lambda: (QUERIES, KEYS, VALUES, 0), ValueError, "the cache is empty"),
    "too many": (lambda: (QUERIES, KEYS, VALUES, 9), ValueError, r"n_packed must be in 0\.\.8"),
    "int queries": (lambda: (QUERIES.astype(mx.int32), KEYS, VALUES, 8), TypeError, "queries must be float16"),
    "two tokens": (lambda: (mx.concatenate([QUERIES] * 2, 2), KEYS, VALUES, 8), ValueError, "queries must be"),
    "heads": (lambda: (QUERIES[:, :3], KEYS, VALUES, 8), ValueError, "multiple of n_kv_heads=2, got 3"),
    "slots": (
        lambda: (QUERIES, KEYS, replaced(VALUES, words=VALUES.words[:, :, :7], norms=VALUES.norms[:, :, :7]), 7),
        ValueError, "values must have the keys' batch"),
    "tail": (lambda: (QUERIES, KEYS, replaced(VALUES, tail=TAIL), 8), ValueError, "sinks and tail"),
    "tail dtype": (
        lambda: (QUERIES, replaced(KEYS, tail=TAIL.astype(mx.float32)), VALUES, 8), ValueError, "keys.tail must be"),
    "width": (lambda: (QUERIES, replaced(KEYS, code_bits=5), VALUES, 8), ValueError, "keys.words has 8 words"),
    "norms": (lambda: (QUERIES, replaced(KEYS, norms=KEYS.norms[:, :, :5]), VALUES, 8), ValueError, "keys.norms"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(arguments, error, message):
    """Each wrong argument is named with its value and the rule."""
    with pytest.raises(error, match=message):
        fused_attention(*arguments(), scale=0.1)


def test_bad_options_are_refused():
    """Masks of the wrong shape, split sizes beside the tile."""
    case = (QUERIES, KEYS, VALUES, 8)
    with pytest.raises(ValueError, match=r"mask must be \[1 or 1, 1, 1, 8\]"):
        fused_attention(*case, scale=0.1, mask=mx.zeros((1, 1, 1, 7)))
    with pytest.raises(ValueError, match="multiple of 32, got 33"):
        fused_attention(*case, scale=0.1, split_tokens=33)


def test_a_head_dim_that_four_simdgroups_cannot_share_is_named():
    """head_dim 2 fits threadgroup memory many times: it is refused for the multiple of 4 that it is not."""
    assert unsupported(2, 1, 4, 4) == "head_dim must be a multiple of 4, a slice for each simdgroup, got 2"


def test_what_does_not_fit_threadgroup_memory_is_refused():
    """16 queries per KV head at head_dim 256 need more than 32 KiB."""
    case = small(n_packed=4, n_kv_heads=1, group=16, head_dim=256, bits=(8, 8))
    with pytest.raises(ValueError, match=r"head_dim=256 with 16 queries .* the limit is 32768"):
        fused_attention(*case, scale=0.1)
