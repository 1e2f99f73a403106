"""Which layers mind compression, which tokens stand out, and how long does it take to find out?

For every model: RateQuant's calibration, timed; the loss forecast for each layer at 2 bits; the KL divergence
measured when only the first quarter of the layers, the layers around the middle, or the rest are at 2 bits and the
others at 6; and the key norms, of tokens that KeyNormObserver flags on either side and of the first token.

    python examples/sensitivity_by_depth.py --models smollm2-135m gemma3-270m --out records/sensitivity.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import veloxquant_mlx  # noqa: F401  (first of all: on Linux it puts a fast BLAS under MLX)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from veloxbench.inputs.corpora import load_text, token_block
from veloxbench.inputs.models import load_model, resolve_model
from veloxbench.measure import machine
from veloxbench.measure.divergence import worker_pool
from veloxbench.measure.protocol import Chunked, feed
from veloxbench.measure.quality import run_arm
from veloxbench.measure.reference import lockstep
from veloxbench.measure.suite import ArmCaches
from veloxbench.methods.cache_under_test import CacheUnderTest
from veloxbench.records import provenance
from veloxquant_mlx.allocators.ratequant import Sensitivities, calibrate_layer_sensitivities, fit_distortion_curve
from veloxquant_mlx.allocators.sensitivity import HeadSensitivities
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.observers.key_norm import KeyNormObserver, Tail

LOW_BITS, HIGH_BITS = 2, 6
BANDS = {"early": (0.0, 8 / 32), "middle": (8 / 32, 17 / 32), "late": (17 / 32, 1.0)}
"""Shares of the depth; the middle is what layers 8 to 16 are of 32."""


def band_of(layer: int, n_layers: int) -> str:
    """The band in which a layer lies."""
    return next(name for name, (low, high) in BANDS.items() if low <= layer / n_layers < high)


def layer_table(sensitivities: Sensitivities) -> list[dict[str, Any]]:
    """Each layer's weights and the loss forecast for it alone at 2 bits, in nats per token."""
    curves = fit_distortion_curve(sensitivities, widths=(LOW_BITS, LOW_BITS + 1))
    column = curves.widths.index(LOW_BITS)
    rows = []
    for layer in sensitivities.layers:
        own = [curve for curve in curves.curves if curve.layer == layer]
        rows.append(
            {
                "layer": layer,
                "band": band_of(layer, sensitivities.provenance.n_layers),
                **{f"{kind}_weight": sum(c.weight for c in own if c.kind == kind) for kind in ("keys", "values")},
                **{
                    f"{kind}_forecast_nats": sum(c.losses[column] for c in own if c.kind == kind)
                    for kind in ("keys", "values")
                },
            }
        )
    return rows


def divergence_by_band(model: Module, tokens: NDArray[np.int32], protocol: Chunked) -> dict[str, Any]:
    """KL divergence of every sequence with one band of the layers at 2 bits and the others at 6."""
    n_layers = len(make_prompt_cache(model))
    found = {}
    with worker_pool() as pool:
        caches = [CacheUnderTest(cache) for cache in make_prompt_cache(model)]
        rows = list(lockstep(feed(model, caches, tokens, protocol), pool))
        for band in BANDS:
            low = [layer for layer in range(n_layers) if band_of(layer, n_layers) == band]
            allocation = {f"layer_{i}": LOW_BITS if i in low else HIGH_BITS for i in range(n_layers)}
            config = KVCacheConfig(method="ratequant", bit_allocation=allocation)
            built = [CacheUnderTest(cache) for cache in KVCacheBuilder.build(model, config)]
            arm = ArmCaches(built, [True] * n_layers, (PackedKVCache,))
            stats, _ = run_arm(model, arm, tokens, protocol, iter(rows), pool, lambda _: None)
            found[band] = {"layers": len(low), "kld_nats": stats.kld_nats.mean(axis=1, dtype=np.float64).tolist()}
    return found


def token_norms(entry: HeadSensitivities) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Norm of every token's keys or values, all heads together, and the squared norm of its gradient: ``[S, T]``."""
    norms = mx.sqrt(mx.sum(mx.square(entry.vectors.astype(mx.float32)), axis=(1, 3)))
    found = np.array(norms, dtype=np.float64)
    return found, entry.squared_gradients[: len(found)].sum(axis=1)


def first_token(entry: HeadSensitivities) -> dict[str, Any]:
    """The first token's norm and squared gradient over those of the others."""
    norms, gradients = token_norms(entry)
    return {
        "layer": entry.layer,
        "kind": entry.kind,
        "norm_ratio": norms[:, 0].mean() / norms[:, 1:].mean(),
        "gradient_ratio": gradients[:, 0].mean() / gradients[:, 1:].mean(),
    }


def key_outliers(entry: HeadSensitivities) -> dict[str, Any]:
    """Keys of one layer: tokens that an observer flags on each side, and their share of the squared gradient."""
    norms, gradients = token_norms(entry)
    row: dict[str, Any] = {"layer": entry.layer, "tokens": norms[:, 1:].size, "gradient_sum": gradients[:, 1:].sum()}
    tails: tuple[Tail, ...] = ("high", "low")
    for tail in tails:
        observer = KeyNormObserver(outlier_threshold=3.0, window_size=256, tail=tail)
        flagged = observer.tracker(entry.layer).flag(entry.vectors)
        row[f"{tail}_flagged"] = int(flagged.sum())
        row[f"{tail}_gradient_sum"] = float(gradients[flagged].sum())
    return row


def measure(name: str, protocol: Chunked, num_samples: int) -> dict[str, Any]:
    """Everything about one model."""
    handle = resolve_model(name, accept_licence=True)
    model, tokenizer = load_model(handle)
    started = time.perf_counter()
    sensitivities = calibrate_layer_sensitivities(model, tokenizer, num_samples=num_samples, quiet=True)
    seconds = time.perf_counter() - started
    block = token_block(
        load_text("wikitext-2"), tokenizer, n_sequences=protocol.sequences, length=protocol.n_tokens + 1
    )
    commit, dirty = provenance.git_state()
    return {
        "model": name,
        "weights_sha256": handle.weights_sha256,
        "calibration": vars(sensitivities.provenance),
        "calibration_seconds": seconds,
        "layers": layer_table(sensitivities),
        "first_token": [first_token(entry) for entry in sensitivities.heads],
        "key_outliers": [key_outliers(entry) for entry in sensitivities.heads if entry.kind == "keys"],
        "text": {"name": block.text, "tokens_sha256": block.sha256},
        "protocol": vars(protocol),
        "divergence": divergence_by_band(model, block.tokens, protocol),
        "provenance": {
            "commit": commit,
            "dirty": dirty,
            "versions": provenance.versions(),
            "hardware": machine.hardware(),
            "state": provenance.machine_state(),
        },
    }


def main() -> None:
    """Measure the models named, and replace their entries in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("records/sensitivity.json"))
    options = parser.parse_args()
    found = {entry["model"]: entry for entry in json.loads(options.out.read_text())} if options.out.exists() else {}
    for name in options.models:
        found[name] = measure(name, Chunked(sequences=options.sequences, length=256), options.num_samples)
        options.out.write_text(json.dumps(list(found.values()), indent=1) + "\n", encoding="utf-8")
        print(f"{name}: calibrated in {found[name]['calibration_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
