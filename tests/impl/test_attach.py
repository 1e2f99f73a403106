"""One line after which mlx-lm builds these caches wherever it builds any, and one that takes it back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest
from impl_inputs import tiny_llama
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from veloxquant_mlx import KVCacheBuilder, KVCacheConfig, attach, detach
from veloxquant_mlx.cache.base import BatchPackedKVCache, PackedKVCache
from veloxquant_mlx.hook import own_caches

CONFIG = KVCacheConfig("turboquant_mse", code_bits=4, sinks=2)
PROMPT = mx.array([5, 9, 2, 77, 31, 8, 120, 64])


@pytest.fixture
def model() -> Any:
    """A model of this test's own: attaching changes it."""
    return tiny_llama()


def kinds(model: Any) -> set[type]:
    return {type(cache) for cache in make_prompt_cache(model)}


def tokens(steps: Any) -> list[int]:
    return [int(token) for token, *_ in steps]


def test_attached_caches_are_those_of_the_builder(model: Any) -> None:
    """``make_prompt_cache`` gives new packed caches with the configuration's specs, each time new ones."""
    attach(model, CONFIG)
    first, second = make_prompt_cache(model), make_prompt_cache(model)
    assert [cache.spec for cache in first] == [cache.spec for cache in KVCacheBuilder.build(model, CONFIG)]
    assert not {id(cache) for cache in first} & {id(cache) for cache in second}


def test_detach_gives_the_models_own_caches_back(model: Any) -> None:
    """After any number of attachments one call undoes them all; a second call changes nothing."""
    attach(model, CONFIG)
    attach(model, KVCacheConfig("turboquant_mse", code_bits=2))
    assert {cache.spec.keys.code_bits for cache in make_prompt_cache(model)} == {2}
    detach(model)
    detach(model)
    assert kinds(model) == {KVCache}
    assert "make_cache" not in vars(model)


def test_a_block_attaches_for_its_length(model: Any) -> None:
    """``with`` puts back what stood before it, another attachment too, whether or not the block raised."""
    attach(model, CONFIG)
    with attach(model, KVCacheConfig("turboquant_mse", code_bits=2)):
        assert {cache.spec.keys.code_bits for cache in make_prompt_cache(model)} == {2}
    with pytest.raises(KeyError), attach(model, KVCacheConfig("turboquant_mse", code_bits=2)):
        raise KeyError
    assert {cache.spec.keys.code_bits for cache in make_prompt_cache(model)} == {4}


def test_hooks_that_end_out_of_order_leave_nothing(model: Any) -> None:
    """The outer of two ends first: the model makes its own caches, and the inner one's end does not undo that."""
    outer, inner = attach(model, CONFIG), attach(model, CONFIG)
    outer.remove()
    inner.remove()
    assert kinds(model) == {KVCache}


def test_a_models_own_make_cache_is_asked_and_comes_back(gemma_model: Any) -> None:
    """gemma3 makes rotating caches for its sliding-window layers: their windows are kept, and they come back."""
    own = make_prompt_cache(gemma_model)
    with attach(gemma_model, CONFIG):
        built = make_prompt_cache(gemma_model)
        assert {type(cache) for cache in built} == {PackedKVCache}
        assert [cache.spec.max_size for cache in built] == [
            cache.max_size if isinstance(cache, RotatingKVCache) else None for cache in own
        ]
    assert [type(cache) for cache in make_prompt_cache(gemma_model)] == [type(cache) for cache in own]


def test_a_builder_that_was_set_by_hand_does_not_recurse(model: Any) -> None:
    """``model.make_cache = lambda: KVCacheBuilder.build(...)``: the builder asks the model's class, not the lambda."""
    model.make_cache = lambda: KVCacheBuilder.build(model, CONFIG)
    assert kinds(model) == {PackedKVCache}
    with attach(model, KVCacheConfig("turboquant_mse", code_bits=2)):
        assert {cache.spec.keys.code_bits for cache in make_prompt_cache(model)} == {2}
    assert {cache.spec.keys.code_bits for cache in make_prompt_cache(model)} == {4}
    assert {type(cache) for cache in own_caches(model)} == {KVCache}


def test_what_does_not_fit_the_model_is_said_at_once(model: Any) -> None:
    """An allocation for another number of layers is refused where it is attached, and nothing is attached."""
    with pytest.raises(ValueError, match="layer_7"):
        attach(model, KVCacheConfig("turboquant_mse", bit_allocation={f"layer_{i}": 2 for i in range(8)}))
    assert kinds(model) == {KVCache}


def test_generation_reads_the_attached_caches(model: Any) -> None:
    """Without ``prompt_cache`` the tokens are those of caches that were built by hand, at 2 bits not those of fp16."""
    config = KVCacheConfig("turboquant_mse", code_bits=1)
    plain = tokens(generate_step(PROMPT, model, max_tokens=12))
    by_hand = tokens(generate_step(PROMPT, model, max_tokens=12, prompt_cache=KVCacheBuilder.build(model, config)))
    with attach(model, config):
        assert tokens(generate_step(PROMPT, model, max_tokens=12)) == by_hand
    assert by_hand != plain
    assert tokens(generate_step(PROMPT, model, max_tokens=12)) == plain


def test_a_batch_is_made_of_the_attached_caches(model: Any) -> None:
    """``BatchGenerator`` makes a cache for each sequence and merges them into the packed batch form."""
    prompts = [PROMPT.tolist(), PROMPT.tolist()[:3], PROMPT.tolist()[2:]]
    with attach(model, CONFIG):
        alone = [tokens(generate_step(mx.array(prompt), model, max_tokens=6)) for prompt in prompts]
        generator = BatchGenerator(model, max_tokens=6)
        answers: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}
        seen: set[type] = set()
        while responses := generator.next_generated():
            seen |= {type(cache) for cache in generator._generation_batch.prompt_cache}
            for response in responses:
                answers[response.uid].append(response.token)
    assert seen == {BatchPackedKVCache}
    assert list(answers.values()) == alone


def test_speculative_decoding_trims_the_attached_caches() -> None:
    """A draft model with another seed proposes what is mostly rejected: the tokens are still the model's own."""
    model, draft = tiny_llama(), tiny_llama(n_layers=1)
    with attach(model, CONFIG), attach(draft, CONFIG):
        alone = tokens(generate_step(PROMPT, model, max_tokens=10))
        drafted = list(speculative_generate_step(PROMPT, model, draft, num_draft_tokens=3, max_tokens=10))
    assert [int(token) for token, *_ in drafted] == alone
    assert not all(from_draft for *_, from_draft in drafted)


def test_the_package_itself_does_not_import_mlx_lm() -> None:
    """The public names load when they are asked for; an unknown one is an AttributeError."""
    code = (
        "import sys, veloxquant_mlx as package; assert 'mlx_lm' not in sys.modules; assert not hasattr(package, 'no')\n"
        "from veloxquant_mlx import *; assert 'mlx_lm' in sys.modules; attach, detach, KVCacheConfig, KVCacheBuilder"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
