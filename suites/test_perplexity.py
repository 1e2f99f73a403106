"""Quality of every arm, as ``veloxbench run --suites perplexity`` measures it."""

import math

from veloxbench.records.arm import REFERENCE
from veloxbench.records.record import Record

SUITE = "perplexity"

# fp16 keeps log-probabilities of magnitude 8..16 to within 2^-8; the divergence that such rounding
# causes is second order, about (2^-8)^2 / 6 nats, and another batch size adds fp32 rounding only.
NOISE_FLOOR_NATS = 1e-5


def test_arm_reads_what_its_cache_stores(record: Record) -> None:
    """Every claimed layer held the tokens, and the loss against fp16 is finite and not negative."""
    assert all(layer.engaged for layer in record.engagement if layer.claimed)
    assert math.isfinite(record.metrics["nll"].value)
    if record.subject.method.name == REFERENCE.name:
        assert record.metrics["bits_per_value"].value == 16.0
        assert record.metrics["kld_floor_mean"].value < NOISE_FLOOR_NATS
    else:
        assert record.metrics["kld_mean"].value > -NOISE_FLOOR_NATS
        assert 0.0 <= record.metrics["top1_agreement"].value <= 1.0
        assert record.metrics["bits_per_value"].value < 16.0
