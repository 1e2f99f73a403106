"""No figure from a guess: masked logits, budgets that nothing fills, values that are not finite."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from veloxbench.errors import ExitCode, NotFiniteError, UnfitEnvironmentError
from veloxbench.measure.divergence import compare_positions, compare_rows, reference_rows, worker_pool
from veloxbench.measure.kernels import head_shape
from veloxbench.measure.memory import tokens_in_budget
from veloxbench.measure.quality import FLOOR_LIMIT, reference_metrics

GIB = 2**30


@pytest.mark.parametrize("masked", [-np.inf, -1e9])
def test_a_masked_token_has_probability_zero_and_costs_nothing(masked):
    """mlx-lm's phi3small masks 91 tokens with -inf: sum p log(p/q) over the others, in fp64, is the divergence."""
    rng, targets = np.random.default_rng(0), np.array([1, 2, 3], np.int32)
    fp16 = rng.standard_normal((3, 50)).astype(np.float32)
    arm = fp16 + 0.1 * rng.standard_normal(fp16.shape).astype(np.float32)
    kept = np.delete(np.stack([fp16, arm]).astype(np.float64), 7, axis=-1)
    log_p, log_q = kept - np.log(np.exp(kept).sum(-1, keepdims=True))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    fp16[:, 7] = arm[:, 7] = masked
    pool = worker_pool()
    rows = reference_rows(fp16.copy(), targets, np.empty(fp16.shape, np.float16), pool)
    # fp16 log-probabilities of magnitude 4 are known to 2e-3, which the divergence feels in second order
    np.testing.assert_allclose(compare_rows(rows, arm.copy(), targets, pool).kld_nats, expected, rtol=0.02)
    figures = compare_positions(mx.array(fp16), mx.array(arm), mx.array(targets))
    # log-probabilities of magnitude 4 are known to 2.4e-7 in fp32
    np.testing.assert_allclose(figures.kld_nats, expected, atol=1e-6)


def reply(*limits: int | None) -> SimpleNamespace:
    """A memory process' account of layers of 64 + 64 fp16 values a token, 32 tokens held."""
    layer = SimpleNamespace(used_bytes=32 * 128 * 2.0, n_values=32 * 128)
    return SimpleNamespace(
        weight_bytes=1000,
        static_bytes=0,
        final=[layer] * len(limits),
        n_values_per_token=[128] * len(limits),
        max_tokens=list(limits),
    )


def test_tokens_in_budget_exist_only_where_memory_bounds_them():
    """One full layer costs 256 bytes a token; sliding layers alone never fill a budget; a context is the end."""
    assert tokens_in_budget(reply(None), 1000 + 256 * 40) == 40
    assert tokens_in_budget(reply(32), 8 * GIB) is None
    assert tokens_in_budget(reply(32, 16), 8 * GIB) is None
    assert tokens_in_budget(reply(None), 8 * GIB, context=2048) == 2048
    assert tokens_in_budget(reply(32), 1000) == 0


def test_a_figure_that_is_not_finite_is_named_in_one_line():
    """Metric, how many, the first: exit code 1, no page of validation text."""
    with pytest.raises(NotFiniteError) as caught:
        reference_metrics(np.ones((2, 4)), np.full((2, 4), np.nan), [])
    assert str(caught.value) == "kld_floor is not finite: 8 of 8 values, the first is nan at [0, 0]"
    assert caught.value.exit_code == ExitCode.REGRESSION


def test_a_reference_that_differs_from_itself_fails_the_run():
    """A half-zeroed matrix gave 0.42 nats; rounding gives 4e-7."""
    with pytest.raises(UnfitEnvironmentError, match=r"differs from itself by 0\.42 nats"):
        reference_metrics(np.ones((2, 4)), np.full((2, 4), 0.42), [])
    assert FLOOR_LIMIT < 0.42


def test_a_model_that_caches_latents_has_no_head_shape(tmp_path):
    """deepseek's config.json says heads that no cache holds."""
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "head_dim": 32, "kv_lora_rank": 64}')
    assert head_shape(tmp_path) is None
