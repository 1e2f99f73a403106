"""Prompt caches on disk: written anew through fisher_klt, and back into any cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fisher_inputs import code, model_of
from mlx_lm.models.cache import KVCache, QuantizedKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

from veloxquant_mlx.archive import archive, held_tokens, refilled, restore
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.cache.base import load_prompt_cache as load_ours

TOKENS = 200


def ids(n: int) -> mx.array:
    return mx.array(np.random.default_rng(3).integers(97, 123, (1, n)))


def filled(model: Any, caches: list[Any], chunks: tuple[int, ...]) -> list[Any]:
    at = 0
    for n in chunks:
        mx.eval(model(ids(TOKENS)[:, at : at + n], cache=caches))
        at += n
    return caches


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_an_archive_holds_what_a_cache_of_that_code_would_hold(tmp_path: Path, family: str) -> None:
    """Of a file of mlx-lm's: a third of its bytes, the bits of the cache that the model filled, and its quality.

    The model's own run stores each chunk's keys after reading coded ones, the archive those of an exact run: both lie
    within the code's own error of the exact ones, so neither is to be further away than twice the other.
    """
    model, made = model_of(family), code("below", family)
    made = made.save(tmp_path / "code.safetensors")
    exact = filled(model, make_prompt_cache(model), (150, 50))
    save_prompt_cache(str(tmp_path / "theirs.safetensors"), exact, {"model": "m"})
    done = archive(tmp_path / "theirs.safetensors", tmp_path / "small.safetensors", made, model)
    assert done.tokens == TOKENS
    ours, metadata = load_ours(tmp_path / "small.safetensors", return_metadata=True)
    assert metadata == {"model": "m"}
    run = filled(model, made.caches(model), (199, 1))
    archived, held = (sum(c.nbytes for c in caches) for caches in (ours, run))
    # Blocks that a window has half left hold stand-ins, which cost less than the tokens that were there.
    assert (0.97 if family == "llama" else 0.9) < archived / held < 1.03
    assert done.nbytes_after < done.nbytes_before / 3 + 8192  # the header of a file of so few tokens
    errors = []
    for caches in (ours, run):
        pairs = zip(held_tokens(caches), held_tokens(exact), strict=True)
        errors.append(sum(float(mx.square(a.keys - b.keys).sum()) for a, b in pairs if a is not None and b is not None))
    assert errors[0] < 2 * errors[1]
    assert errors[0] > 0


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_restored_file_is_mlx_lms_own_and_goes_on_as_the_archive_does(tmp_path: Path, family: str) -> None:
    """mlx-lm loads it, offsets and windows are those of before, and the next logits are the archive's.

    Both read the same decoded tokens; the archive's are coded once more where they age by the step, whose error the
    tolerance is: that of the code at its youngest step, in logits, of the exact cache.
    """
    model, made = model_of(family), code("below", family)
    made = made.save(tmp_path / "code.safetensors")
    exact = filled(model, make_prompt_cache(model), (150, 50))
    save_prompt_cache(str(tmp_path / "theirs.safetensors"), exact)
    archive(tmp_path / "theirs.safetensors", tmp_path / "small.safetensors", made, model)
    restore(tmp_path / "small.safetensors", tmp_path / "back.safetensors", model)
    back = load_ours(tmp_path / "back.safetensors")
    assert [type(c) for c in back] == [type(c) for c in exact]
    assert [c.offset for c in back] == [TOKENS] * len(back)
    small = load_ours(tmp_path / "small.safetensors")
    token = ids(1)
    logits = [model(token, cache=caches) for caches in (back, small, exact)]
    mx.eval(logits)
    differs = float(mx.abs(logits[0] - logits[1]).max())
    assert differs <= 0.5 * float(mx.abs(logits[0] - logits[2]).max()) + 1e-3


def test_tokens_go_into_any_cache_and_are_read_from_any() -> None:
    """From mlx-lm's quantized cache into TurboQuant's, and from there into fp16: each hop adds its own error only."""
    model = model_of("llama")
    exact = filled(model, make_prompt_cache(model), (150, 50))
    quantized = [cache.to_quantized(group_size=32, bits=8) for cache in exact]
    assert isinstance(quantized[0], QuantizedKVCache)
    packed = refilled(quantized, KVCacheBuilder.build(model, KVCacheConfig("turboquant_mse", code_bits=8)))
    plain = refilled(packed, make_prompt_cache(model))
    assert all(isinstance(cache, KVCache) and cache.offset == TOKENS for cache in plain)
    for before, after in zip(held_tokens(exact), held_tokens(plain), strict=True):
        assert before is not None
        assert after is not None
        error = float(mx.square(before.values - after.values).sum() / mx.square(before.values).sum())
        assert 0 < error < 1e-3  # 8 bits: D of a Gaussian at 8 bits is 4e-5, of mlx-lm's 8-bit groups of 32 less


def test_what_cannot_be_archived_is_refused(tmp_path: Path) -> None:
    """Another number of layers, a full target, an unsaved calibration, a batch: one sentence each."""
    model = model_of("llama")
    exact = filled(model, make_prompt_cache(model), (TOKENS,))
    with pytest.raises(ValueError, match="other models"):
        refilled(exact, make_prompt_cache(model)[:1])
    with pytest.raises(ValueError, match="holds tokens already"):
        refilled(exact, filled(model, make_prompt_cache(model), (3,)))
    with pytest.raises(ValueError, match="never saved"):
        archive(tmp_path / "x", tmp_path / "y", code("layer"), model)
    with pytest.raises(ValueError, match="single sequences"):
        held_tokens([KVCache.merge([exact[0], exact[0]])])


def test_the_command_says_a_missing_file_in_a_sentence(tmp_path: Path) -> None:
    """Exit code 2, one sentence, no traceback; the help names both commands."""
    python = [sys.executable, "-m", "veloxquant_mlx"]
    helped = subprocess.run([*python, "--help"], capture_output=True, text=True, check=True)
    assert "archive" in helped.stdout
    assert "restore" in helped.stdout
    options = ["--model", "m", "--calibration", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "o")]
    ran = subprocess.run([*python, "archive", str(tmp_path / "f"), *options], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "there is no calibration at" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_mlx_lm_itself_reads_a_restored_cache_saved_by_its_own_function(tmp_path: Path) -> None:
    """What :func:`refilled` gives into mlx-lm's caches, mlx-lm saves and loads."""
    model = model_of("llama")
    ours = filled(model, code("layer").caches(model), (TOKENS,))
    save_prompt_cache(str(tmp_path / "f.safetensors"), refilled(ours, make_prompt_cache(model)))
    loaded = load_prompt_cache(str(tmp_path / "f.safetensors"))
    assert [cache.offset for cache in loaded] == [TOKENS] * len(loaded)
