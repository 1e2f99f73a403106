"""Speed of every arm beside fp16, as ``veloxbench run --suites throughput`` measures it."""

from veloxbench.records import Record

SUITE = "throughput"


def test_arm_was_timed_in_pairs_with_fp16(record: Record) -> None:
    """Each arm has as many fp16 timings as its own, taken in the same run, and a ratio from them."""
    for name in ("prefill", "ttft", "decode"):
        own, reference = record.samples[f"{name}_arm"], record.samples[f"{name}_fp16"]
        assert len(own) == len(reference) > 0
        assert min(own) > 0
        assert min(reference) > 0
    assert record.metrics["decode_speed_ratio"].value > 0
