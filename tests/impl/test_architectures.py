"""Caches do what models do: every architecture of mlx-lm that builds in tiny size runs on ours, or there is a
reason why not.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from architectures import VOCABULARY, architectures, configuration, tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from veloxbench.errors import UsageError
from veloxbench.inputs.models import load_model, resolve_model
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.cache.fused import leaves

HALF_PRECISION = 4e-3
"""Relative error of logits when K and V are fp16 in an fp32 model: eight roundings of 2**-11."""

PROMPT = (0, 20, 29, 30, 31)
"""Chunks of a prompt longer than the sliding windows of 8, then single tokens."""

NOT_BUILT = {
    "bitnet": "its layers are a Metal kernel",
    "muse_spark": "its layers are a Metal kernel",
    "phi3small": "it masks logits from token 100256 on",
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "its weights exist packed only",
}
NOTHING_TO_PACK = "no layer keeps keys and values that can be packed"


def logits(model: Any, ids: mx.array, cache: list[Any]) -> list[mx.array]:
    """Those of each chunk."""
    made = [model(ids[:, start:stop], cache=cache) for start, stop in itertools.pairwise(PROMPT)]
    mx.eval(made)
    return made


def swept(name: str) -> str:
    """``agrees``, or why the model cannot be served."""
    if name in NOT_BUILT:
        return f"not built: {NOT_BUILT[name]}"
    model = tiny(name)
    ids = mx.array(np.random.default_rng(0).integers(0, VOCABULARY, (2, PROMPT[-1])))
    expected = logits(model, ids, make_prompt_cache(model))
    exact = KVCacheBuilder.build(model, KVCacheConfig(method="turboquant_mse", window=1000))
    if not any(isinstance(cache, PackedKVCache) for cache in leaves(exact)):
        kinds = sorted({type(cache).__name__ for cache in leaves(exact)})
        return f"not supported: {NOTHING_TO_PACK} ({', '.join(kinds)})"
    for got, wanted in zip(logits(model, ids, exact), expected, strict=True):
        assert (mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted)).item() < HALF_PRECISION
    coded = KVCacheBuilder.build(model, KVCacheConfig(method="turboquant_mse", code_bits=8))
    assert all(bool(mx.all(mx.isfinite(got))) for got in logits(model, ids[:1], coded))
    return "agrees"


@pytest.mark.parametrize("name", architectures())
def test_each_architecture_agrees_or_says_why_not(name: str) -> None:
    """With everything in fp16 windows, logits of chunks, single tokens and two sequences are those of mlx-lm's caches
    to half precision; with 8-bit codes they are finite; the page says the same.
    """
    assert f"| `{name}` | {swept(name)} |" in PAGE.read_text(encoding="utf-8").splitlines()


PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_the_page_names_every_architecture() -> None:
    """docs/architectures.md has one row for each module of mlx_lm.models that holds a model."""
    rows = [line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert rows == architectures()


@pytest.mark.parametrize(("name", "n_layers", "least"), [("gemma3n", 2, 4), ("lfm2", 1, 2)])
def test_a_model_cut_too_short_names_the_fewest_layers(name: str, n_layers: int, least: int, tmp_path: Path) -> None:
    """gemma3n's last two layers read what earlier ones hold, and lfm2's first layer is a convolution."""
    config = {"model_type": name, **configuration(name)}
    weights = dict(tree_flatten(tiny(name).parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model("smollm2-135m").directory / file, tmp_path / file)
    with pytest.raises(UsageError, match=rf"n_layers={n_layers}: .* can be cut to {least}\.\.4 layers"):
        load_model(resolve_model(str(tmp_path)), n_layers=n_layers)
