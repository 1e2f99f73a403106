"""Runs in the environment of another instrument, and imports nothing of this project: its figures on given tokens.

Reads one JSON request from standard input (instrument, model, tokens, settings, library) and answers in one JSON line.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

Score = Callable[[list[int], int], dict[str, float]]
"""Figures of one sequence, its tokens and the cache's bits given."""


def mlx_quant_fidelity(directory: str, group_size: int) -> Score:
    """Its stress mode: quantized from the first token; the last token is a target alone."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_quant_fidelity.corpora import Corpus, CorpusProvenance
    from mlx_quant_fidelity.probes.kv import score_kv_config

    model = load(directory)[0]

    def score(tokens: list[int], bits: int) -> dict[str, float]:
        told = CorpusProvenance("given", "", "", len(tokens), len(tokens), "none", "none", "none", len(tokens))
        corpus = Corpus((mx.array(tokens),), told)
        report = score_kv_config(model, corpus, model_id="given", kv_bits=bits, kv_group_size=group_size)
        delta_nll = math.log(report.perplexity_quant / report.perplexity_ref)
        return {"kld_mean": report.kl.mean, "changed": report.flip_rate, "delta_nll": delta_nll}

    return score


def refract_llm(directory: str, group_size: int) -> Score:
    """Its axis KLD@D, whose chunks it cuts from a tokenized file: the file has the tokens, and nothing is tokenized."""
    from refract.backends import mlx as backend

    if group_size != backend._translate_kv_to_mlx("ctk=q8_0,ctv=q8_0")["kv_group_size"]:
        raise SystemExit(f"refract-llm does not quantize in groups of {group_size}")
    model = backend._load_model(directory)[0]
    backend._MODEL_CACHE[directory] = model, SimpleNamespace(encode=lambda text, **_: json.loads(text))

    def score(tokens: list[int], bits: int) -> dict[str, float]:
        scored = tokens[:-1]  # it scores what follows every token of a chunk, the last one's too
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder, "tokens.json")
            corpus.write_text(json.dumps(scored), encoding="utf-8")
            kld = backend.MLXBackend().run_kld(
                model=directory,
                corpus=corpus,
                ref_kv_str="ctk=f16,ctv=f16",
                cand_kv_str=f"ctk=q{bits}_0,ctv=q{bits}_0",
                chunks=1,
                ctx=len(scored),
            )
        return {"kld_mean": kld.mean_kld}

    return score


SCORES: Final = {"mlx-quant-fidelity": mlx_quant_fidelity, "refract-llm": refract_llm}


def main() -> None:
    """Score every sequence by itself, so that instruments can be compared sequence by sequence."""
    request: dict[str, Any] = json.load(sys.stdin)
    if request["library"]:
        ctypes.CDLL(request["library"], ctypes.RTLD_GLOBAL)  # a real BLAS comes before MLX
    score = SCORES[request["instrument"]](request["model"], request["group_size"])
    figures: dict[str, dict[str, list[float]]] = {}
    for bits in request["bits"]:
        of_width = figures[str(bits)] = {}
        for at, tokens in enumerate(request["tokens"], start=1):
            for figure, value in score(tokens, bits).items():
                of_width.setdefault(figure, []).append(value)
            print(f"{bits} bits: {at} of {len(request['tokens'])}", file=sys.stderr, flush=True)
    versions = {name: importlib.metadata.version(name) for name in (request["instrument"], "mlx", "mlx-lm")}
    print(json.dumps({"versions": versions, "figures": figures}))


if __name__ == "__main__":
    main()
