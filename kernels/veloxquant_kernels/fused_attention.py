"""Decode attention that reads a packed TurboQuant cache directly: no decoded key or value reaches memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from veloxquant_kernels.emulator.run import THREADGROUP_MEMORY
from veloxquant_kernels.kernel import SIMDGROUPS, Backend, Kernel, check_float, no_rows, resolve_backend
from veloxquant_kernels.packing import check_code_bits, check_words, packed_words
from veloxquant_kernels.rotation import check_signs, hadamard_order
from veloxquant_kernels.turboquant import check_norms, decode_in_order

TILE: Final = 32
"""Tokens that a threadgroup holds at a time."""
OVERHEAD_SHARE: Final = 16
"""A split reads at least this many packed bytes for each byte that splitting costs."""

_SPLIT = Kernel(
    "fused_attention",
    (
        "queries",
        *(f"key_{part}" for part in ("words", "norms", "centroids", "signs")),
        *(f"value_{part}" for part in ("words", "norms", "centroids")),
        *("sink_keys", "sink_values", "tail_keys", "tail_values", "mask", "counts", "scale"),
    ),
    ("partial_values", "partial_stats"),
    ("packing", "rotation"),
)
_MERGE = Kernel(
    "fused_attention_merge",
    ("partial_values", "partial_stats", "value_signs", "counts"),
    ("out",),
    ("rotation",),
)


@dataclass(frozen=True)
class PackedSide:
    """Keys or values of one layer as a cache holds them: ``[sinks | packed | tail]`` in time order.

    Args:
        words: ``[B, n_kv_heads, slots, W]`` uint32; slots may exceed the tokens in use.
        norms: ``[B, n_kv_heads, slots, 1]`` fp16.
        centroids: ``[2**code_bits]`` fp32.
        signs: ``[D]`` fp32 of ±1, the rotation's diagonal.
        code_bits: width of a code, 1..8.
        sinks: ``[B, n_kv_heads, S, D]`` fp16 tokens before the packed ones, or None.
        tail: ``[B, n_kv_heads, R, D]`` fp16 tokens behind the packed ones, or None.
    """

    words: mx.array
    norms: mx.array
    centroids: mx.array
    signs: mx.array
    code_bits: int
    sinks: mx.array | None = None
    tail: mx.array | None = None

    @property
    def head_dim(self) -> int:
        """Values of a row."""
        return self.signs.size

    def check(self, name: str) -> None:
        """Raise unless the arrays belong together."""
        check_code_bits(self.code_bits, name=f"{name}.code_bits")
        if self.words.ndim != 4 or no_rows(name, self.words):
            raise ValueError(f"{name}.words must be [B, n_kv_heads, slots, W], none of them 0, got {self.words.shape}")
        check_signs(self.signs, self.head_dim)
        check_words(self.words, self.code_bits, self.head_dim, f"{name}.words")
        check_norms(self.norms, self.words, f"{name}.norms")
        levels = (1 << self.code_bits,)
        if self.centroids.dtype != mx.float32 or tuple(self.centroids.shape) != levels:
            raise ValueError(
                f"{name}.centroids must be float32 of shape {levels}, got {self.centroids.dtype} {self.centroids.shape}"
            )
        for part, tokens in (("sinks", self.sinks), ("tail", self.tail)):
            if tokens is None:
                continue
            lead = (*self.words.shape[:2], tokens.shape[2] if tokens.ndim == 4 else -1, self.head_dim)
            if tokens.dtype != mx.float16 or tuple(tokens.shape) != lead or not tokens.size:
                raise ValueError(
                    f"{name}.{part} must be float16 [{lead[0]}, {lead[1]}, n, {self.head_dim}] with n > 0, "
                    f"got {tokens.dtype} {tuple(tokens.shape)}"
                )


def _n_tokens(tokens: mx.array | None) -> int:
    return 0 if tokens is None else tokens.shape[2]


def threadgroup_bytes(head_dim: int, group: int, key_bits: int, value_bits: int) -> int:
    """Threadgroup memory of the first pass, in bytes."""
    stride = max(packed_words(head_dim, key_bits), packed_words(head_dim, value_bits)) | 1
    scratch = SIMDGROUPS * head_dim if hadamard_order(head_dim) > 1 else 1
    tables = (1 << key_bits) + (1 << value_bits)
    per_query = head_dim + SIMDGROUPS * TILE + TILE + 1
    return 4 * (group * per_query + scratch + tables + TILE * stride + 3 * TILE)


def unsupported(head_dim: int, group: int, key_bits: int, value_bits: int) -> str | None:
    """Why the kernel cannot serve ``group`` queries per KV head of ``head_dim`` channels, or None if it can."""
    try:
        needed = threadgroup_bytes(head_dim, group, key_bits, value_bits)
    except ValueError as error:
        return str(error)
    if head_dim % SIMDGROUPS:
        return f"head_dim must be a multiple of {SIMDGROUPS}, a slice for each simdgroup, got {head_dim}"
    if needed <= THREADGROUP_MEMORY:
        return None
    return (
        f"head_dim={head_dim} with {group} queries per KV head needs {needed} bytes of threadgroup memory; the limit "
        f"is {THREADGROUP_MEMORY}"
    )


def default_split_tokens(
    n_packed: int, head_dim: int, group: int, key_bits: int, value_bits: int, query_bytes: int
) -> int:
    """Tokens of a split: as many equal splits as cost no more than a sixteenth of the packed bytes.

    More splits keep more of the GPU busy. Each writes, and the second pass reads, ``group`` fp32 rows and their
    statistics, and each loads the queries, both codebooks and the signs anew.
    """
    per_token = 4 * (packed_words(head_dim, key_bits) + packed_words(head_dim, value_bits)) + 4
    tables = 4 * ((1 << key_bits) + (1 << value_bits) + head_dim)
    per_split = 2 * 4 * group * (head_dim + 2) + query_bytes * group * head_dim + tables
    n_splits = max(1, n_packed * per_token // (OVERHEAD_SHARE * per_split))
    return max(1, -(-n_packed // (n_splits * TILE))) * TILE


def _check_mask(mask: mx.array, n_batch: int, n_tokens: int) -> mx.array:
    shape = tuple(mask.shape)
    if len(shape) != 4 or shape[1:] != (1, 1, n_tokens) or shape[0] not in (1, n_batch):
        raise ValueError(f"mask must be [1 or {n_batch}, 1, 1, {n_tokens}], got {shape}")
    if mask.dtype != mx.bool_:
        check_float("mask", mask)
    return mx.broadcast_to(mask, (n_batch, 1, 1, n_tokens)).reshape(n_batch, n_tokens)


def decode_side(side: PackedSide, n_packed: int) -> mx.array:
    """All tokens of a side in time order, ``[B, n_kv_heads, tokens, D]`` fp32."""
    parts = [] if side.sinks is None else [side.sinks.astype(mx.float32)]
    if n_packed:
        words, norms = side.words[:, :, :n_packed], side.norms[:, :, :n_packed]
        tables = (side.centroids, side.signs, side.code_bits)
        parts.append(decode_in_order(words, norms, *tables, mx.float32))
    parts += [] if side.tail is None else [side.tail.astype(mx.float32)]
    return mx.concatenate(parts, axis=2)


def fused_attention_reference(
    queries: mx.array,
    keys: PackedSide,
    values: PackedSide,
    n_packed: int,
    scale: float,
    mask: mx.array | None = None,
) -> mx.array:
    """The definition: decode everything in fp32, then softmax attention in fp32; zeros where no token is visible."""
    n_batch, n_heads, _, head_dim = queries.shape
    n_kv_heads = keys.words.shape[1]
    grouped = queries.astype(mx.float32).reshape(n_batch, n_kv_heads, n_heads // n_kv_heads, head_dim) * scale
    scores = grouped @ decode_side(keys, n_packed).swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask.astype(mx.float32)
    top = mx.maximum(mx.max(scores, axis=-1, keepdims=True), mx.finfo(mx.float32).min)
    weights = mx.exp(scores - top)
    total = mx.sum(weights, axis=-1, keepdims=True)
    out = mx.where(total > 0, (weights @ decode_side(values, n_packed)) / mx.maximum(total, 1e-38), 0)
    return out.reshape(queries.shape).astype(queries.dtype)


def fused_attention(
    queries: mx.array,
    keys: PackedSide,
    values: PackedSide,
    n_packed: int,
    *,
    scale: float,
    mask: mx.array | None = None,
    split_tokens: int | None = None,
    backend: Backend | None = None,
) -> mx.array:
    """Attention of one new token per sequence over packed keys and values, with their sinks and tails.

    Args:
        queries: ``[B, n_heads, 1, D]`` fp16, bf16 or fp32; n_heads a multiple of n_kv_heads.
        keys: the keys; their width and the values' may differ.
        values: the values.
        n_packed: packed tokens in use, at most the slots.
        scale: of the scores, usually ``D ** -0.5``.
        mask: None, or ``[B or 1, 1, 1, tokens]``: bool (false hides), or a float that is added to the scores.
        split_tokens: tokens per threadgroup, a multiple of 32; None weighs traffic against parallelism.
        backend: where to run; None takes Metal where it is MLX's default device, else the reference.

    Returns:
        ``[B, n_heads, 1, D]`` of the queries' dtype. A query whose tokens are all hidden gets zeros.

    Raises:
        ValueError: an empty cache, arrays whose shapes do not belong together, or a head_dim and group of queries
            that do not fit threadgroup memory.
        TypeError: an element type other than the stated ones.

    Sources: online softmax, Milakov & Gimelshein 2018; splits over tokens, Flash-Decoding (Dao et al. 2023);
    rotation folded into the query, QuaRot (arXiv 2404.00456).
    """
    check_float("queries", queries)
    keys.check("keys")
    values.check("values")
    n_batch, n_kv_heads, slots = keys.words.shape[:3]
    if queries.ndim != 4 or queries.shape[0] != n_batch or queries.shape[2:] != (1, keys.head_dim):
        raise ValueError(f"queries must be [{n_batch}, n_heads, 1, {keys.head_dim}], got {tuple(queries.shape)}")
    n_heads, head_dim = queries.shape[1], queries.shape[3]
    if n_heads == 0 or n_heads % n_kv_heads:
        raise ValueError(f"n_heads must be a multiple of n_kv_heads={n_kv_heads}, got {n_heads}")
    if values.words.shape[:3] != keys.words.shape[:3] or values.head_dim != head_dim:
        raise ValueError(
            f"values must have the keys' batch, heads, slots and head_dim {(*keys.words.shape[:3], head_dim)}, "
            f"got {(*values.words.shape[:3], values.head_dim)}"
        )
    n_sinks, n_tail = _n_tokens(keys.sinks), _n_tokens(keys.tail)
    if (_n_tokens(values.sinks), _n_tokens(values.tail)) != (n_sinks, n_tail):
        raise ValueError(
            f"values must have the keys' sinks and tail, {(n_sinks, n_tail)} tokens, got "
            f"{(_n_tokens(values.sinks), _n_tokens(values.tail))}"
        )
    if not 0 <= n_packed <= slots:
        raise ValueError(f"n_packed must be in 0..{slots}, the slots, got {n_packed}")
    n_tokens = n_packed + n_sinks + n_tail
    if not n_tokens:
        raise ValueError("the cache is empty: attention needs at least one token")
    flat_mask = None if mask is None else _check_mask(mask, n_batch, n_tokens)
    group = n_heads // n_kv_heads
    order = hadamard_order(head_dim)
    problem = unsupported(head_dim, group, keys.code_bits, values.code_bits)
    if problem is not None:
        raise ValueError(problem)
    if split_tokens is None:
        split_tokens = default_split_tokens(
            n_packed, head_dim, group, keys.code_bits, values.code_bits, queries.dtype.size
        )
    if split_tokens < TILE or split_tokens % TILE:
        raise ValueError(f"split_tokens must be a positive multiple of {TILE}, got {split_tokens}")
    backend = resolve_backend(backend)
    if backend == "reference":
        return fused_attention_reference(queries, keys, values, n_packed, scale, mask)

    nothing = mx.zeros((1,), mx.float16)
    counts = mx.array([n_packed, n_sinks, n_tail, split_tokens], dtype=mx.uint32)
    n_splits = -(-n_packed // split_tokens) + -(-(n_sinks + n_tail) // split_tokens)
    n_rows = n_batch * n_heads
    mask_kind = 0 if mask is None else 1 if mask.dtype == mx.bool_ else 2
    partial_values, partial_stats = _SPLIT(
        [
            queries,
            *(keys.words, keys.norms, keys.centroids, keys.signs),
            *(values.words, values.norms, values.centroids),
            *(nothing if x is None else x for x in (keys.sinks, values.sinks, keys.tail, values.tail)),
            nothing if flat_mask is None else flat_mask,
            counts,
            mx.array(scale, dtype=mx.float32),
        ],
        backend=backend,
        template=[
            ("HEAD_DIM", head_dim),
            ("ORDER", order),
            ("K_BITS", keys.code_bits),
            ("V_BITS", values.code_bits),
            ("GROUP", group),
            ("MASK_KIND", mask_kind),
        ],
        grid=(n_splits * SIMDGROUPS * 32, n_batch * n_kv_heads, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(n_rows, n_splits, head_dim), (n_rows, n_splits, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    (out,) = _MERGE(
        [partial_values, partial_stats, values.signs, counts],
        backend=backend,
        template=[("T", queries.dtype), ("HEAD_DIM", head_dim), ("ORDER", order)],
        grid=(-(-n_rows // SIMDGROUPS) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(n_rows, head_dim)],
        output_dtypes=[queries.dtype],
    )
    return out.reshape(queries.shape)
