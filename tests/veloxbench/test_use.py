"""Caches in use: mlx-lm's generate, chat and server with an arm attached, as users run them."""

from __future__ import annotations

import importlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlx_lm
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from veloxbench.cli.app import _run
from veloxbench.run.use import load, resident
from veloxquant_mlx.cache.base import PackedKVCache
from veloxquant_mlx.hook import detach

ARM = "turboquant_mse@4:sinks=4"
STORY = "Once upon a time there was a small fox who lived at the edge of a large forest. Every morning the fox "
DECIDED = ("1, 2, 3, 4, 5, 6, 7,", "a b c d e f g", "11, 12, 13, 14, 15,", "A, B, C, D, E, F,")
"""Prompts whose next six tokens a whole model is sure of by more than a nat (``The number four is``: by .07): a batch
adds in another order, which draws the noise of 4-bit codes anew and turns what is as good as a tie."""
HELD = re.compile(r"([\d,]+) tokens in ([\d.,]+ \w+) \(fp16: ([\d.,]+ \w+)")
UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6}


def said(text: str) -> list[tuple[int, float, float]]:
    """Tokens, bytes held and bytes in fp16 of every line that says what caches hold."""
    lines = [[part.replace(",", "") for part in parts] for parts in HELD.findall(text)]
    sizes = [[float(size.split()[0]) * UNITS[size.split()[1]] for size in parts[1:]] for parts in lines]
    return [(int(parts[0]), held, fp16) for parts, (held, fp16) in zip(lines, sizes, strict=True)]


def answer(client: httpx.Client, prompt: str, tokens: int = 8) -> dict[str, Any]:
    """One completion: its text, and how many tokens of the prompt came from the store."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    reply = client.post("/v1/completions", json=body).raise_for_status().json()
    cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return {"text": reply["choices"][0]["text"], "prompt": reply["usage"]["prompt_tokens"], "cached": cached}


@contextmanager
def served(model: Path | str, log: Path) -> Iterator[httpx.Client]:
    """A client of ``veloxbench serve`` in a process of its own, which Ctrl-C ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "veloxbench.cli", "serve", "--model", str(model), "--cache", ARM, "--port", port]
    with log.open("w") as out, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                try:
                    client.get("/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield client
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def serve_and_check(model: Path | str, log: Path) -> None:
    """Alone, at once, once more, cut back: the answers are those of the library, and prompts are reused."""
    network, tokenizer = load(str(model), ARM)
    try:
        steps = list(mlx_lm.stream_generate(network, tokenizer, STORY + "went", max_tokens=8))
    finally:
        detach(network)
    expected = "".join(step.text for step in steps)
    # mlx-lm's text has no space where an answer begins with one
    both = tokenizer.decode(tokenizer.encode(STORY + "went") + [step.token for step in steps])
    with served(model, log) as client:
        first = answer(client, STORY + "went")
        assert first["text"] == expected
        assert first["cached"] == 0
        trimmed = answer(client, STORY + "slept")  # shares a prefix, and differs: the stored cache is cut back
        assert first["prompt"] - 3 <= trimmed["cached"] < trimmed["prompt"]
        longer = answer(client, both + " and then")  # goes on where the first answer ended
        assert longer["cached"] > first["prompt"]
        with ThreadPoolExecutor(len(DECIDED)) as pool:
            together = list(pool.map(lambda prompt: answer(client, prompt, 6)["text"], DECIDED))
        assert together == [answer(client, prompt, 6)["text"] for prompt in DECIDED]
    lines = said(log.read_text())
    assert len(lines) >= 3 + 2 * len(DECIDED)
    for tokens, held, fp16 in lines:
        # 4 sinks of 16 bits, then 4.25 bits a value (4-bit codes, fp16 norm for 64 values); printed to 1 decimal
        sinks = min(4, tokens)
        assert held / fp16 == pytest.approx((sinks * 16 + (tokens - sinks) * 4.25) / (16 * tokens), rel=0.02)


def test_the_server_over_http(cut_model, tmp_path):
    """A real client, several requests at once, reuse of prompts and trimming, on a model of two layers."""
    serve_and_check(cut_model, tmp_path / "server.log")


@pytest.mark.slow
def test_the_server_over_http_on_a_whole_model(tmp_path):
    """The same on all of smollm2-135m."""
    serve_and_check("smollm2-135m", tmp_path / "server.log")


def test_generate_passes_mlx_lms_options_on_and_says_what_is_held(cut_model, capfd):
    """A sampler's option of mlx-lm's works, and the bytes printed at the end are those of 4.25 bits per value."""
    options = ["--prompt", STORY, "--max-tokens", "24", "--temp", "0.0", "--ignore-chat-template"]
    assert _run(["generate", "--model", str(cut_model), "--cache", "turboquant_mse@4", *options]) == 0
    out, err = capfd.readouterr()
    assert "Generation: 24 tokens" in out
    ((tokens, held, fp16),) = said(err)
    assert tokens > 24
    assert fp16 / held == pytest.approx(16 / 4.25, rel=0.02)  # one decimal of a kB


def test_chat_says_what_is_held_after_every_turn(cut_model, capfd, monkeypatch):
    """Two questions, two lines, the second with more tokens; the end of the input ends the chat."""
    questions = iter(["Who are you?", "And why?"])

    def ask(self: Any) -> str:
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("mlx_lm.cli_ui.ChatUI.prompt", ask)
    assert _run(["chat", "--model", str(cut_model), "--cache", ARM, "--max-tokens", "6"]) == 0
    first, second = (tokens for tokens, *_ in said(capfd.readouterr().err))
    assert 0 < first < second


@pytest.mark.parametrize(
    ("command", "when", "kept"),
    [
        ("generate", "stream_generate", "the text so far stands above"),
        ("chat", "stream_generate", "the conversation was in memory alone"),
        ("generate", "load", "the model was not ready yet; finished downloads and calibrations are kept"),
    ],
)
def test_ctrl_c_says_what_is_kept(command, when, kept, cut_model, capfd, monkeypatch):
    """In the middle of an answer, or before the model is there: exit 130, one sentence, no traceback."""

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"mlx_lm.{command}"), when, stopped)
    monkeypatch.setattr("mlx_lm.cli_ui.ChatUI.prompt", lambda self: "Who are you?")
    options = ["--prompt", STORY] if command == "generate" else []
    assert _run([command, "--model", str(cut_model), "--cache", ARM, *options]) == 130
    said = capfd.readouterr().err
    assert f"veloxbench: stopped; {kept}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("option", ["--kv-bits", "--max-kv-size", "--prompt-cache-file", "--kv-bits=4"])
def test_an_option_that_chooses_caches_is_refused(option, capfd):
    """What mlx-lm would silently not do is an error that names both options."""
    command = ["generate", "--model", "smollm2-135m", "--cache", ARM, "--prompt", "x", option, "4"]
    assert _run(command) == 4
    assert f"{option.split('=')[0]} and --cache both choose the caches" in capfd.readouterr().err


def test_what_mlx_lm_refuses_is_a_usage_error(capfd):
    """argparse's own message, then one sentence and exit code 4; nothing is loaded."""
    assert _run(["generate", "--model", "smollm2-135m", "--cache", ARM, "--max-tokens", "many"]) == 4
    assert "invalid int value: 'many'" in capfd.readouterr().err


@pytest.mark.parametrize("cache", ["turboquant_mse 4", "turboquant@4", "turboquant_mse@4:sink=4"])
def test_a_cache_that_is_no_arm_is_said_before_anything_is_loaded(cache, cut_model, capfd):
    """Spelling, method and parameter, each in a sentence."""
    assert _run(["chat", "--model", str(cut_model), "--cache", cache]) == 4
    assert "turboquant_mse" in capfd.readouterr().err


def test_every_registered_kind_of_arm_attaches(cut_model):
    """Ours, mlx-lm's own (whose factory asks mlx-lm for the model's caches) and fp16; the last attached counts."""
    kinds = []
    for arm in ("turboquant_mse@4", "mlx-affine@4", "fp16"):
        model, _ = load(str(cut_model), arm)
        kinds.append(type(make_prompt_cache(model)[0]).__name__)
    assert kinds == [PackedKVCache.__name__, QuantizedKVCache.__name__, "KVCache"]


def test_what_is_resident_counts_a_draft_models_caches_not(llama_like):
    """Of caches that follow the model's own nothing is counted, nor of layers without attention."""
    caches, shapes = llama_like
    alone = resident(caches, shapes)
    assert resident([*caches, object()], shapes) == alone
    assert resident(caches, [None, *shapes[1:]]).held == pytest.approx(alone.held / 2)
    # fp16: keys and values of two layers, 10 tokens, 3 heads of 64 values
    assert alone.fp16 == 2 * 2 * 2 * 10 * 3 * 64


@pytest.fixture
def llama_like(cut_model):
    """Two layers' caches of ten tokens, and their shapes."""
    from veloxbench.methods.registry import geometry

    model, tokenizer = load(str(cut_model), "turboquant_mse@4")
    caches = make_prompt_cache(model)
    mlx_lm.generate(model, tokenizer, prompt=list(range(10, 19)), max_tokens=1, prompt_cache=caches)
    for cache in caches:
        cache.trim(max(0, cache.offset - 10))
    detach(model)
    return caches, geometry([], model)
