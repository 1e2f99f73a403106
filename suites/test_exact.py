"""Codes, bytes and allocations on fixed inputs, as ``veloxbench run --suites exact`` measures them."""

from veloxbench.records.record import Record

SUITE = "exact"


def test_case_gives_facts(record: Record) -> None:
    """Every case produces something to compare, and codes survive packing."""
    assert record.metrics or record.samples
    if "wrong" in record.metrics:
        assert record.metrics["wrong"].value == 0
