"""The project's published figures for WikiText-2, reproduced by the harness (slow: minutes of model time)."""

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.inputs.models import resolve_model
from veloxbench.measure import quality
from veloxbench.measure.divergence import worker_pool
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.measure.reference import ReferenceCache, vocabulary_of
from veloxbench.methods.registry import checked
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.run.progress import LineProgress
from veloxbench.run.session import opened

pytestmark = pytest.mark.slow

# WikiText-2 test, its first 4097 tokens as one sequence, chunks of 256, every token scored.
PROTOCOL = Chunked(1, 4096, chunk=256, score_from=0)
PERPLEXITY = 18.13
# KLD in nats and the tolerance: +-15% for another random rotation and fp16 storage of keys and values;
# +-.0001, one unit of the last digit published, for 8 bits.
PUBLISHED = {
    ("mlx-affine", 8.0): (0.0003, 0.0001),
    ("mlx-affine", 4.0): (0.114, 0.15 * 0.114),
    ("turboquant_mse", 4.0): (0.059, 0.15 * 0.059),
    ("turboquant_mse", 3.0): (0.246, 0.15 * 0.246),
    ("turboquant_mse", 2.0): (1.27, 0.15 * 1.27),
}


def never():
    raise AssertionError("the reference was written a moment ago")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    handle = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(handle.directory)
    tokens = token_block(
        load_text("wikitext-2"), tokenizer, n_sequences=1, length=4097, start=0, contiguous=True
    ).tokens
    references = ReferenceCache(tmp_path_factory.mktemp("reference"))
    pool = worker_pool()
    with opened(handle, None, LineProgress()) as bench:
        steps = feed(bench.model, bench.caches(REFERENCE).caches, tokens, PROTOCOL)
        written = references.write("k", steps, 4096, vocabulary_of(bench.model, tokens), pool)
        nll = quality.run_reference(written, 1, lambda _: None)
        yield bench, tokens, references, pool, nll


def test_perplexity_of_the_fp16_cache(run):
    """The fp16 arm reads the text as published."""
    assert np.exp(run[-1].mean()) == pytest.approx(PERPLEXITY, abs=0.02)


@pytest.mark.parametrize(("method", "target"), PUBLISHED)
def test_divergence_of_each_arm(run, method, target):
    """Mean KLD against fp16 lands on the published figure."""
    bench, tokens, references, pool, _ = run
    rows = references.read("k", quality.rows_per_step(PROTOCOL, 1), never)
    arm = bench.caches(checked(Arm(name=method, target=target)))
    stats, _ = quality.run_arm(bench.model, arm, tokens, PROTOCOL, rows, pool, lambda _: None)
    kld, tolerance = PUBLISHED[method, target]
    print(f"\n{method} {target:g}: KLD {stats.kld_nats.mean():.5f}, published {kld}")
    assert stats.kld_nats.mean() == pytest.approx(kld, abs=tolerance)
