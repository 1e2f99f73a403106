"""fisher_klt in real caches: bytes, ages, a plain model of it, save and load, batches, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fisher_inputs import AT_TOKENS, code, measurements, model_of
from impl_inputs import tiny_llama
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from veloxbench.errors import EngagementError
from veloxbench.measure import account
from veloxquant_mlx import attach
from veloxquant_mlx.cache.base import PackedKVCache, load_prompt_cache, save_prompt_cache
from veloxquant_mlx.cache.coded import CodedStore, cut_into_blocks
from veloxquant_mlx.calibration.fisher_klt import FisherCode, decoded_caches, find_calibration
from veloxquant_mlx.calibration.fitting import fit_code

SCOPES = ("head", "layer", "below")
ROUNDED = 0.02
"""Part of tokens that may differ in an integer: fp32 rounding of a product depends on how many rows it has."""


def ids(n: int, seed: int = 0, n_batch: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(97, 123, (n_batch, n)))


def in_use(cache: Any) -> float:
    return sum(held.array.nbytes * held.used_slots / held.slots for held in cache.held_arrays())


def feed(model: Any, caches: list[Any], tokens: mx.array, chunks: list[int]) -> list[mx.array]:
    out, at = [], 0
    for n in chunks:
        out.append(model(tokens[:, at : at + n], cache=caches))
        mx.eval(out[-1])
        at += n
    return out


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("scope", SCOPES)
def test_bytes_in_use_are_the_formula(scope: str, family: str) -> None:
    """After chunks, single tokens and a trim, arrays and the lengths of their symbols agree to the byte."""
    model, caches = model_of(family), code(scope, family).caches(model_of(family))
    for n_batch in (1, 3):
        caches = code(scope, family).caches(model)
        tokens = ids(120, n_batch=n_batch)
        feed(model, caches, tokens, [1, 2, 50, 1, 1, 1, 64])
        for cache in caches:
            assert isinstance(cache, PackedKVCache)
            assert in_use(cache) == cache.formula_nbytes() == cache.nbytes
            assert cache.size() == min(120, cache.max_size or 120)
        if all(cache.is_trimmable() for cache in caches):
            for cache in caches:
                assert cache.trim(70) == 70
                assert in_use(cache) == cache.formula_nbytes()
                assert cache.values_held() == n_batch * 50 * 128


def test_blocks_are_cut_at_positions_alone() -> None:
    """Old tokens at every 256th position and once at the last 32nd; younger ones in one block each."""
    parts = cut_into_blocks(4, [700, 748], 764)
    assert [(p.tier, p.first, p.last) for p in parts] == [
        (0, 4, 256),
        (0, 256, 512),
        (0, 512, 672),
        (0, 672, 700),
        (1, 700, 748),
        (2, 748, 764),
    ]


def test_ages_decide_who_is_coded_how() -> None:
    """After 300 single tokens the last 16 are youngest, 48 before them in between, 4 sinks exact."""
    caches = code("layer").caches(model_of("llama"))
    feed(model_of("llama"), caches, ids(300), [200] + [1] * 100)
    for cache in caches:
        assert cache.storage._parts == cut_into_blocks(4, [236, 284], 300)


@pytest.mark.parametrize("aged", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_kept_decoded_changes_nothing(scope: str, aged: bool) -> None:
    """Logits with decoded tokens kept beside the codes are those without, but for the order of sums in products."""
    model, tokens, logits = model_of("llama"), ids(150, n_batch=2), []
    for keep in (False, True):
        caches = code(scope, aged=aged).caches(model)
        for cache in caches:
            cache.keep_decoded = keep
        logits.append(mx.concatenate(feed(model, caches, tokens, [60, 1, 1, 1, 30, 57]), axis=1))
        assert all(("kept beside" in cache.attention) == keep for cache in caches)
    assert mx.abs(logits[0] - logits[1]).max().item() < 1e-4  # logits of order 1 in fp32


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_decoded_survives_a_step(scope: str) -> None:
    """The account walks everything reachable from a cache after a step: what is not declared would be an error."""
    model, caches = model_of("llama"), code(scope).caches(model_of("llama"))
    feed(model, caches, ids(90), [60, 1, 29])
    for cache in caches:
        assert account.held_arrays(cache)
        assert not cache.decoded_arrays()
    store = caches[2].storage
    store._fetched = (4, mx.zeros((1, 2, 86, 32)), mx.zeros((1, 2, 86, 32)))
    with pytest.raises(EngagementError, match="account leaves out"):
        account.held_arrays(caches[2])
    store._fetched = None
    store.spy = np.zeros((90, 128), np.float32)
    with pytest.raises(EngagementError, match=r"account leaves out: storage\.spy"):
        account.held_arrays(caches[2])


def test_a_vector_that_nobody_took_is_seen_and_then_thrown_away() -> None:
    """A pass that breaks off after the first layer leaves an entry: the account sees it, a copy's pass removes it."""
    model, made = model_of("llama"), code("below")
    caches = made.caches(model)
    fresh = copy.deepcopy(caches)
    keys = mx.array(np.random.default_rng(0).standard_normal((1, 2, 20, 32)).astype(np.float16))
    caches[0].update_and_fetch(keys, keys)
    with pytest.raises(EngagementError, match="account leaves out"):
        account.held_arrays(caches[0])
    feed(model, fresh, ids(30), [30])
    assert account.held_arrays(fresh[0])
    assert account.held_arrays(caches[0])


def test_layers_must_step_together() -> None:
    """A predicted layer that is updated alone says which layer it waits for."""
    caches = code("below").caches(model_of("llama"))
    keys = mx.zeros((1, 2, 20, 32), dtype=mx.float16)
    with pytest.raises(RuntimeError, match="layer 1 is predicted from layer 0, which decoded nothing for tokens 0 to"):
        caches[1].update_and_fetch(keys, keys)
    feed(model_of("llama"), caches, ids(30), [30])
    with pytest.raises(RuntimeError, match="can be read in a step only"):
        caches[1].keys_and_values()


@pytest.mark.parametrize("scope", SCOPES)
def test_caches_can_be_read_outside_of_a_step(scope: str) -> None:
    """Decoding all layers in order gives what attention read in the last step, of one token."""
    model, caches = model_of("llama"), code(scope).caches(model_of("llama"))
    feed(model, caches, ids(99), [98, 1])
    copies = copy.deepcopy(caches)
    for cache in copies:
        cache.storage.spec.handoff._waiting.clear()
    read: list[Any] = []
    for cache in caches:
        inner = cache.storage.fetch
        cache.storage.fetch = lambda *a, inner=inner: read.append(inner(*a)) or read[-1]
    feed(model, caches, ids(1, 5), [1])
    for cache in caches:
        del cache.storage.fetch
    for (keys, values), (read_keys, read_values) in zip(decoded_caches(caches), read, strict=True):
        assert mx.abs(keys - read_keys).max().item() < 1e-4
        assert mx.abs(values - read_values).max().item() < 1e-4


# ---- a plain model -------------------------------------------------------------------------------


class Plain:
    """One layer of scope ``layer`` token by token: exact sinks, then coefficients with the tier they are coded at."""

    def __init__(self, store: CodedStore) -> None:
        self.code, self.spec = store.spec.code, store.spec
        self.tokens: list[tuple[int, np.ndarray]] = []  # tier (-1: a sink), vector or coefficients

    def append(self, keys: mx.array, values: mx.array) -> None:
        offset = len(self.tokens)
        for i, (tier, y) in enumerate(self.tokens):
            age = offset - i
            wanted = sum(age < limit for limit in self.spec.ages)
            if 0 <= wanted < tier:
                zone = self.code.tiers[wanted].zone
                self.tokens[i] = (wanted, zone.values(zone.quantize(y)))
        x = self.code.transform.vectors(keys, values, offset)
        y = np.array(self.code.transform.encode(x))[0]
        for i in range(keys.shape[2]):
            if offset + i < self.spec.sinks:
                self.tokens.append((-1, np.array(x[0, i] - self.code.transform.mean)))
            else:
                zone = self.code.tiers[-1].zone
                self.tokens.append((len(self.spec.ages), zone.values(zone.quantize(y[i]))))

    def read(self, count: int) -> tuple[mx.array, mx.array]:
        first, transform = len(self.tokens) - count, self.code.transform
        rows = [
            mx.array(y) if tier < 0 else transform.decode(mx.array(y)[None, None])[0, 0]
            for tier, y in self.tokens[first:]
        ]
        return transform.keys_and_values(mx.stack(rows)[None], first)


@pytest.mark.parametrize(("family", "layer"), [("llama", 1), ("gemma", 1), ("gemma", 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_walk_agrees_with_a_plain_model(family: str, layer: int, seed: int, tmp_path: Path) -> None:
    """60 updates, trims, copies, saves and loads in any order: every read, and the bytes, are the plain model's."""
    rng, made = np.random.default_rng(seed), code("layer", family)
    cache = made.caches(model_of(family))[layer]
    heads, dim = made.layers[layer].transform.shape.n_kv_heads, made.layers[layer].transform.shape.key_dim
    plain = Plain(cache.storage)
    scale = float(np.array(made.layers[layer].transform.deviations).max()) ** 0.25
    for _ in range(60):
        kind = rng.choice(["update", "step", "trim", "copy", "save"], p=[0.3, 0.4, 0.1, 0.1, 0.1])
        if kind in ("update", "step"):
            n = 1 if kind == "step" else int(rng.integers(1, 40))
            x = mx.array((scale * rng.standard_normal((2, 1, heads, n, dim))).astype(np.float16))
            read = cache.update_and_fetch(x[0], x[1])
            plain.append(x[0], x[1])
            for got, want in zip(read, plain.read(read[0].shape[2]), strict=True):
                assert got.shape == want.shape
                error = np.array(mx.abs(got - want).max(axis=(0, 1, 3)))
                assert (error > 1e-3 * scale).sum() <= max(1, ROUNDED * len(error))
        elif kind == "trim" and cache.is_trimmable():
            n = cache.trim(int(rng.integers(1, 30)))
            del plain.tokens[len(plain.tokens) - n :]
        elif kind == "copy":
            twin = copy.deepcopy(cache)
            x = mx.zeros((1, heads, 2, dim), dtype=mx.float16)
            cache.update_and_fetch(x, x)  # the original goes on; its copy must not notice
            cache = twin
        elif kind == "save":
            save_prompt_cache(tmp_path / "c.safetensors", [cache])
            (cache,) = load_prompt_cache(tmp_path / "c.safetensors")
        assert cache.offset == len(plain.tokens)
        assert in_use(cache) == cache.formula_nbytes()


def test_coding_anew_stays_within_the_steps() -> None:
    """An old token went through three codes: no coefficient is further off than their bins' widths together."""
    made = code("layer")
    cache, layer = made.caches(model_of("llama"))[0], made.layers[0]
    rng = np.random.default_rng(3)
    x = mx.array(rng.standard_normal((1, 2, 200, 32)).astype(np.float16))
    for i in range(200):
        keys, values = cache.update_and_fetch(x[:, :, i : i + 1], -x[:, :, i : i + 1])
    transform = layer.transform
    was, now = (np.array(transform.encode(transform.vectors(k, v))[0]) for k, v in ((x, -x), (keys, values)))
    error = np.abs(was - now)
    steps = [tier.zone.step for tier in layer.tiers]
    slack = 1e-2 * steps[-1]  # fp16 tables: what encode does to decode's output
    assert error[4:136].max() <= sum(steps) + slack
    assert error[136:184].max() <= sum(steps[1:]) + slack
    assert error[184:].max() <= steps[2] + slack
    assert error[4:136].max() > steps[1]  # they were coded anew indeed
    assert error[:4].max() < slack


# ---- in mlx-lm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_saved_cache_continues_like_the_original(scope: str, family: str, tmp_path: Path) -> None:
    """Logits after load equal those of the cache that was saved, bit for bit."""
    model, made = model_of(family), code(scope, family)
    caches = made.caches(model)
    feed(model, caches, ids(100), [100])
    save_prompt_cache(tmp_path / "c.safetensors", caches, {"model": "tiny"})
    loaded, metadata = load_prompt_cache(tmp_path / "c.safetensors", return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert [cache.spec for cache in loaded] == [cache.spec for cache in caches]
    want = feed(model, caches, ids(9, 1), [5, 4])
    got = feed(model, loaded, ids(9, 1), [5, 4])
    assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_calibration_in_memory_is_found_after_its_equal_has_gone() -> None:
    """Two calibrations of one hash live; the younger is dropped; a saved cache still finds the elder."""
    elder = code("layer")
    younger = dataclasses.replace(elder)
    assert find_calibration(elder.sha256, None).sha256 == elder.sha256
    del younger
    gc.collect()
    assert find_calibration(elder.sha256, None).sha256 == elder.sha256


def test_generation_repeats_itself() -> None:
    """mlx-lm's generate_step fills our caches with prompt and answer, and repeats itself exactly."""
    model, made = model_of("llama"), code("below")
    answers = []
    for _ in range(2):
        caches = made.caches(model)
        steps = generate_step(ids(60)[0], model, max_tokens=6, prompt_cache=caches, prefill_step_size=32)
        answers.append([int(token) for token, _ in steps])
    plain = make_prompt_cache(model)
    for _ in generate_step(ids(60)[0], model, max_tokens=6, prompt_cache=plain, prefill_step_size=32):
        pass
    assert answers[0] == answers[1]
    assert [cache.size() for cache in caches] == [cache.size() for cache in plain]


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("scope", ["layer", "below"])
def test_batch_generation_gives_the_answers_of_single_generation(scope: str, family: str) -> None:
    """mlx-lm's BatchGenerator over prompts of 21, 4 and 35 tokens answers as three single runs do."""
    model, made = model_of(family), code(scope, family)
    prompts = [np.array(ids(n, n)[0]).tolist() for n in (21, 4, 35)]
    singles = []
    for prompt in prompts:
        steps = generate_step(
            mx.array(prompt), model, max_tokens=8, prompt_cache=made.caches(model), prefill_step_size=16
        )
        singles.append([int(token) for token, _ in steps])
    generator = BatchGenerator(model, max_tokens=8, prefill_step_size=16, completion_batch_size=2)
    uids = generator.insert(prompts, caches=[made.caches(model) for _ in prompts])
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    assert [answers[uid] for uid in uids] == singles


@pytest.mark.parametrize("scope", ["layer", "below"])
def test_a_batch_decodes_each_sequence_like_its_single_cache(scope: str) -> None:
    """Merged sequences of 40, 7 and 0 tokens go on as each does alone, and hold the same bytes."""
    model, made = model_of("llama"), code(scope)
    singles = [made.caches(model) for _ in range(3)]
    for caches, n in zip(singles, (40, 7, 0), strict=True):
        if n:
            feed(model, caches, ids(n, n), [n])
    batch: list[Any] = [PackedKVCache.merge([caches[i] for caches in singles]) for i in range(3)]
    step = ids(2, 9, n_batch=3)
    together = feed(model, batch, step, [2])[0]
    for row, caches in enumerate(singles):
        alone = feed(model, caches, step[row : row + 1], [2])[0]
        assert mx.abs(together[row] - alone[0]).max().item() < 1e-4
        assert [in_use(cache.extract(row)) for cache in batch] == [in_use(cache) for cache in caches]


@pytest.mark.parametrize("scope", ["layer", "below"])
def test_lockstep_rows_are_single_caches(scope: str) -> None:
    """Three sequences in lockstep hold, row by row, what three caches of one sequence hold."""
    model, made = model_of("llama"), code(scope)
    together, tokens = made.caches(model), ids(130, 2, n_batch=3)
    feed(model, together, tokens, [100, 29, 1])
    for row in range(3):
        alone = made.caches(model)
        feed(model, alone, tokens[row : row + 1], [100, 29, 1])
        for cache, single in zip(together, alone, strict=True):
            part = cache.rows(slice(row, row + 1))
            assert in_use(part) == part.formula_nbytes()
            assert abs(in_use(part) - in_use(single)) <= ROUNDED * in_use(single)


# ---- targets and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_a_target_is_met_from_below(scope: Any) -> None:
    """A code for 3 bits a value costs at most 3 on held-out vectors, and not much less."""
    made = fit_code(measurements(), target=3.0, scope=scope, at_tokens=AT_TOKENS)
    assert 2.8 < made.bits_per_value <= 3.0


def test_a_file_holds_the_calibration(tmp_path: Path) -> None:
    """Caches of a loaded calibration decode as those of the saved one; its hash is the same."""
    model, made = model_of("llama"), code("below")
    saved = made.save(tmp_path / "code.safetensors")
    loaded = FisherCode.load(tmp_path / "code.safetensors", scope="below")
    assert (loaded.sha256, loaded.path) == (made.sha256, saved.path)
    assert (loaded.bits_per_value, loaded.sinks, loaded.ages) == (made.bits_per_value, made.sinks, made.ages)
    both = [feed(model, each.caches(model), ids(40), [30, 10])[1] for each in (made, loaded)]
    assert mx.array_equal(both[0], both[1])


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Another scope, a changed table, a cut file, another model, a calibration that is gone: a sentence each."""
    path = tmp_path / "code.safetensors"
    code("below").save(path)
    with pytest.raises(ValueError, match="of scope 'below', not 'head'"):
        FisherCode.load(path, scope="head")
    with pytest.raises(ValueError, match=r"this model's is .*: calibrate it"):
        FisherCode.load(path).caches(tiny_llama(head_dim=32, n_layers=2))
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its tables do not have the hash"):
        FisherCode.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged or no calibration"):
        FisherCode.load(path)
    with pytest.raises(ValueError, match=r"there is no calibration at .*: load it first"):
        find_calibration("0" * 64, str(tmp_path / "gone.safetensors"))
    code("layer").save(path)
    with pytest.raises(ValueError, match=r"holds .*: load the right one first"):
        find_calibration("0" * 64, str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a target or a step"),
        ({"target": 2.0, "step": 0.1}, "give a target or a step"),
        ({"target": -1.0}, r"target must lie within 0\.\.16"),
        ({"step": float("nan")}, "step must be finite"),
        ({"target": 2.0, "scope": "heads"}, "scope must be one of head, layer, below"),
        ({"target": 0.001}, r"no step was found for 0\.001 bits"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options: dict[str, Any], message: str) -> None:
    """One sentence names the argument and its rule."""
    with pytest.raises(ValueError, match=message):
        fit_code(measurements(), at_tokens=AT_TOKENS, **options)


def test_attach_takes_a_calibration_of_this_model_only() -> None:
    """After one line mlx-lm's own generation runs on coded caches; a calibration of another model is refused there."""
    model = tiny_llama(head_dim=32)
    with pytest.raises(ValueError, match="the calibration is of a"):
        attach(tiny_llama(n_layers=2, head_dim=32), code())
    with attach(model, code()):
        assert {type(cache) for cache in make_prompt_cache(model)} == {PackedKVCache}
        tokens = [token for token, _ in generate_step(mx.array([97, 98, 99]), model, max_tokens=4)]
        assert len(tokens) == 4
    assert {type(cache) for cache in make_prompt_cache(model)} == {KVCache}


def lists_of_one_calibration(kind: str, folder: Path) -> tuple[list[Any], list[Any]]:
    """Two lists of empty caches: made one after the other, the second a copy of the first, or both from one file."""
    made = code("below")
    caches = made.caches(model_of("llama"))
    if kind == "made":
        return caches, made.caches(model_of("llama"))
    if kind == "copied":
        return caches, copy.deepcopy(caches)
    save_prompt_cache(folder / "c.safetensors", caches)
    return load_prompt_cache(folder / "c.safetensors"), load_prompt_cache(folder / "c.safetensors")


@pytest.mark.parametrize("kind", ["made", "copied", "loaded"])
def test_a_pass_that_was_broken_off_leaves_nothing_to_other_caches(kind: str, tmp_path: Path) -> None:
    """A pass ends in an exception after layer 0; a prompt as long, in other caches, gives the logits that it always
    gives, alone and in a batch of two."""
    model, tokens = model_of("llama"), ids(40, 1)
    clean = feed(model, code("below").caches(model), tokens, [40])[0]
    for batched in (False, True):
        broken, caches = lists_of_one_calibration(kind, tmp_path)
        if batched:
            broken, caches = (
                [PackedKVCache.merge([one, copy.deepcopy(one)]) for one in each] for each in (broken, caches)
            )
        n_batch = 1 + batched

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        broken[1].update_and_fetch = stop
        with pytest.raises(KeyboardInterrupt):
            feed(model, broken, ids(40, 2, n_batch), [40])
        got = feed(model, caches, mx.repeat(tokens, n_batch, axis=0), [40])[0]
        assert mx.abs(got - clean).max().item() < 1e-4  # logits of order 1 in fp32; a batch adds in another order


def test_two_threads_that_copy_a_cache_do_not_meet() -> None:
    """Sequences that step layer by layer in turns, each in its thread, give what each gives alone."""
    model, made = model_of("llama"), code("below")
    tokens = [ids(40, seed) for seed in (1, 2)]
    clean = [feed(model, made.caches(model), each, [40])[0] for each in tokens]
    caches = made.caches(model)
    lists, got = [caches, copy.deepcopy(caches)], [None, None]
    turns = threading.Barrier(2, timeout=60)

    def run(i: int) -> None:
        for cache in lists[i]:
            inner = cache.update_and_fetch

            def in_turn(keys: mx.array, values: mx.array, inner: Any = inner) -> Any:
                turns.wait()
                return inner(keys, values)

            cache.update_and_fetch = in_turn
        got[i] = feed(model, lists[i], tokens[i], [40])[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mx.array_equal(one, other) for one, other in zip(got, clean, strict=True))
