"""Runs in the environment of mlx-quant-fidelity, and imports nothing of this project: its figures on given tokens.

Reads one JSON request from standard input (model, tokens, settings, library) and answers in one JSON line.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import math
import sys
from typing import Any


def main() -> None:
    """Score every sequence by itself, so that both instruments can be compared sequence by sequence."""
    request: dict[str, Any] = json.load(sys.stdin)
    if request["library"]:
        ctypes.CDLL(request["library"], ctypes.RTLD_GLOBAL)  # a real BLAS comes before MLX
    import mlx.core as mx
    from mlx_lm import load
    from mlx_quant_fidelity.corpora import Corpus, CorpusProvenance
    from mlx_quant_fidelity.probes.kv import score_kv_config

    model = load(request["model"])[0]
    answers: dict[str, list[dict[str, float]]] = {}
    for bits in request["bits"]:
        answers[str(bits)] = []
        for tokens in request["tokens"]:
            told = CorpusProvenance("given", "", "", len(tokens), len(tokens), "none", "none", "none", len(tokens))
            corpus = Corpus((mx.array(tokens),), told)
            report = score_kv_config(model, corpus, model_id="given", kv_bits=bits, kv_group_size=request["group_size"])
            answers[str(bits)].append(
                {
                    "kld_mean": report.kl.mean,
                    "changed": report.flip_rate,
                    "delta_nll": math.log(report.perplexity_quant / report.perplexity_ref),
                }
            )
            print(f"{bits} bits: {len(answers[str(bits)])} of {len(request['tokens'])}", file=sys.stderr, flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    print(json.dumps({"versions": versions, **answers}))


if __name__ == "__main__":
    main()
