"""The gate as pytest items: `pytest --benchmark --veloxbench-profile benchmarks/gate.toml` measures, then judges.

`record` and `gate_findings` are fixtures of veloxbench; `SUITE` says which measurements a module receives.
Without `--benchmark` the first test is a smoke run on veloxbench's own grid, and the second is skipped.
"""

import pytest

from veloxbench.gate.verdicts import Verdict, overall, sentence

SUITE = "perplexity"


def test_every_layer_is_held_by_the_cache_that_claims_it(record):
    """A layer that silently stayed in fp16 would look like excellent quality."""
    assert all(layer.engaged for layer in record.engagement if layer.claimed)


def test_the_gate_is_open(gate_findings):
    """Everything that the baselines hold was measured, and lost no more than its limit."""
    if overall(gate_findings) is not Verdict.PASS:
        pytest.fail(sentence(gate_findings), pytrace=False)
