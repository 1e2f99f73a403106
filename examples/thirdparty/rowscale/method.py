"""What VeloxBench has to know of the cache: its name, how a model's caches are built, and what they should weigh."""

from fractions import Fraction

from rowscale.cache import RowScaleCache
from veloxbench.methods.registry import plain_caches, register


def formula(cache, tokens, geometry):
    """Bytes that one layer should hold after so many tokens: one a value, and two scales of two bytes per KV head."""
    return Fraction(tokens * (geometry.n_values + 2 * 2 * geometry.n_kv_heads))


@register(
    "rowscale",
    summary="one byte per value, one fp16 scale per token and head",
    cache_classes=(RowScaleCache,),
    targets=(8,),
    target_means="code_bits",
    formula=formula,
)
def rowscale(context, target):
    """A ``RowScaleCache`` in place of every plain ``KVCache`` of the model; sliding windows stay as they are."""
    return plain_caches(context.model, lambda layer: RowScaleCache())
