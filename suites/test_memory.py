"""Resident bytes of every arm, as ``veloxbench run --suites memory`` measures them."""

from veloxbench.records.arm import REFERENCE
from veloxbench.records.record import Record

SUITE = "memory"

# The allocator rounds each buffer up to a page; a hidden fp16 copy of the smallest grid is 780 kB.
PAGE_ROUNDING_BYTES = 64 * 1024


def test_arm_holds_the_bytes_that_it_counts(record: Record) -> None:
    """MLX holds the arrays counted, all of them and nothing more, and fp16 reads exactly 16 bits."""
    cache_bytes = record.metrics["cache_bytes"].value
    # rounding only adds: below zero an array was counted twice, or was not there
    assert 0 <= record.metrics["unaccounted_bytes"].value < 0.05 * cache_bytes + PAGE_ROUNDING_BYTES
    if record.subject.method.name == REFERENCE.name:
        assert record.metrics["bits_per_value"].value == 16.0
    assert record.metrics["allocated_bits_per_value"].value >= record.metrics["bits_per_value"].value
