"""Speed of every arm beside fp16, as ``veloxbench run --suites throughput`` measures it."""

import pytest

from veloxbench.records.record import Record

SUITE = "throughput"


def test_arm_was_timed_in_pairs_with_fp16(record: Record) -> None:
    """Each arm has as many fp16 timings as its own, taken in the same run, and a ratio from them."""
    for name in ("prefill", "ttft", "decode"):
        own, reference = record.samples[f"{name}_arm"], record.samples[f"{name}_fp16"]
        assert len(own) == len(reference) > 0
        assert min(own) > 0
        assert min(reference) > 0
    assert record.metrics["decode_speed_ratio"].value > 0


# Without a Metal device every step decodes the whole cache; at 2048 tokens it may cost so much beside fp16's.
CPU_LIMITS = {"decode": 2.0, "prefill": 1.3}


def test_four_bits_on_a_cpu_stay_within_their_limits(record: Record) -> None:
    """On CPU at 2048 tokens a decode step takes at most 2.0 and prefill at most 1.3 times the fp16 cache's."""
    method, depth = record.subject.method, record.subject.settings["depth"]
    on_cpu = record.provenance.hardware["device"] == "cpu"
    if not on_cpu or depth != 2048 or (method.name, method.target) != ("turboquant_mse", 4.0):
        pytest.skip("the limits are for turboquant_mse@4 at 2048 tokens on a CPU")
    for phase, limit in CPU_LIMITS.items():
        assert 1 / record.metrics[f"{phase}_speed_ratio"].value <= limit
