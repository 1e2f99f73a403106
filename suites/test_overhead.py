"""What the perplexity suite costs beyond the bare forward passes that it needs (with ``--benchmark``).

The account is of one arm and its reference. The noise floor is not in it: that is a measurement of its own, an arm's
pass of fp16 over two sequences, once for each model, text and protocol however many arms follow.
"""

import time
from collections.abc import Callable, Iterator

import pytest

from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.inputs.models import resolve_model
from veloxbench.measure import quality
from veloxbench.measure.divergence import ReferenceRows, worker_pool
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.measure.reference import ReferenceCache, vocabulary_of
from veloxbench.measure.suite import Bench
from veloxbench.methods.registry import checked
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.intervals import ratio_interval
from veloxbench.run.progress import LineProgress
from veloxbench.run.session import opened

PROTOCOL = Chunked(8, 256, chunk=64, score_from=64)
PAIRS = 4
LIMIT = 1.15


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    if not request.config.getoption("--benchmark"):
        pytest.skip("a timing: run with --benchmark")
    with opened(resolve_model("smollm2-135m"), None, LineProgress()) as bench:
        yield bench


def never() -> Iterator[ReferenceRows]:
    raise AssertionError("the reference was written a moment ago")


def test_comparing_costs_little_beside_the_forward_pass(bench, tmp_path, record_property):
    """Reference pass and arm pass of the suite take at most 1.15 x the same passes without any comparison."""
    tokens = token_block(load_text("wikitext-2"), bench.context.tokenizer, n_sequences=8, length=257).tokens
    arm = checked(Arm(name="turboquant_mse", target=4.0))
    pool, cache = worker_pool(), ReferenceCache(tmp_path)
    vocabulary, n_rows = vocabulary_of(bench.model, tokens), 8 * PROTOCOL.n_scored
    rows = quality.rows_per_step(PROTOCOL, 8)

    def bare() -> None:
        for each in (REFERENCE, arm):
            for _ in feed(bench.model, bench.caches(each).caches, tokens, PROTOCOL):
                pass

    def suite() -> None:
        key = str(time.monotonic_ns())
        steps = feed(bench.model, bench.caches(REFERENCE).caches, tokens, PROTOCOL)
        quality.run_reference(cache.write(key, steps, n_rows, vocabulary, pool), 8, lambda _: None)
        caches, reference = bench.caches(arm), cache.read(key, rows, never)
        stats, nll = quality.run_arm(bench.model, caches, tokens, PROTOCOL, reference, pool, lambda _: None)
        quality.arm_metrics(stats, nll, caches.engagement())

    def seconds(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    bare()
    pairs = []
    for turn in range(PAIRS):  # ABBA: a machine that drifts moves both
        both = {work.__name__: seconds(work) for work in ((suite, bare) if turn % 2 else (bare, suite))}
        pairs.append((both["suite"], both["bare"]))
    ratio = ratio_interval([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    print(f"\nsuite / bare forward passes: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {PAIRS} pairs")
    record_property("suite_over_bare", ratio.value)
    assert ratio.value <= LIMIT
