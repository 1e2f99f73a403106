"""Resident bytes of every arm, as ``veloxbench run --suites memory`` measures them."""

from veloxbench.plan import REFERENCE
from veloxbench.records import Record

SUITE = "memory"


def test_arm_holds_the_bytes_that_it_counts(record: Record) -> None:
    """MLX holds nothing for the cache beyond the arrays counted, and fp16 reads exactly 16 bits."""
    cache_bytes = record.metrics["cache_bytes"].value
    # a few scalars and the last token's logits may be alive; a hidden fp16 copy would be 100% or more
    assert record.metrics["unaccounted_bytes"].value < 0.05 * cache_bytes
    if record.subject.method.name == REFERENCE.method:
        assert record.metrics["bits_per_value"].value == 16.0
    assert record.metrics["allocated_bits_per_value"].value >= record.metrics["bits_per_value"].value
