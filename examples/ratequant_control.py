"""Does RateQuant's allocation beat its own shuffles, and uniform widths that cost more?

For every text and target: the mean KL divergence from the fp16 cache, per sequence, of RateQuant's allocation, of
shuffles that deal its widths to other units at random (same histogram, same bytes), of the same code at the
next larger uniform width, and of TurboQuant MSE likewise. Differences are paired by sequence, with Student-t
intervals; an allocation that does not beat its shuffles knows nothing of the model.

    python examples/ratequant_control.py --targets 3 2 1.5 --shuffles 20
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from veloxbench.adapter import CacheUnderTest, bits_per_value
from veloxbench.corpora import load_text, token_block
from veloxbench.measure.divergence import ReferenceRows, worker_pool
from veloxbench.measure.quality import ArmCaches, run_arm
from veloxbench.measure.reference import lockstep
from veloxbench.models import load_model, resolve_model
from veloxbench.protocol import Chunked, feed
from veloxbench.stats import mean_interval
from veloxquant_mlx.allocators.ratequant import (
    Sensitivities,
    allocate_bits_ratequant,
    calibrate_layer_sensitivities,
    fit_distortion_curve,
    shuffled,
)
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig, PackedKVCache
from veloxquant_mlx.methods import make_options


@dataclass(frozen=True)
class Bench:
    """One text in fp16's eyes: tokens, and the reference rows of every scored step."""

    model: Module
    tokens: NDArray[np.int32]
    protocol: Chunked
    rows: list[ReferenceRows]
    pool: ThreadPoolExecutor

    def measure(self, config: KVCacheConfig) -> tuple[NDArray[np.float64], float]:
        """Mean KL divergence of each sequence in nats per token, and the resident bits per value."""
        caches = [CacheUnderTest(cache) for cache in KVCacheBuilder.build(self.model, config)]
        arm = ArmCaches(caches, [True] * len(caches), (PackedKVCache,))
        stats, _ = run_arm(self.model, arm, self.tokens, self.protocol, iter(self.rows), self.pool, lambda _: None)
        return stats.kld_nats.mean(axis=1, dtype=np.float64), bits_per_value(arm.engagement())


def bench(model: Module, tokenizer: Any, text: str, protocol: Chunked, pool: ThreadPoolExecutor) -> Bench:
    """Run the fp16 cache over a text's evaluation part."""
    block = token_block(load_text(text), tokenizer, n_sequences=protocol.sequences, length=protocol.n_tokens + 1)
    caches = [CacheUnderTest(cache) for cache in make_prompt_cache(model)]
    return Bench(model, block.tokens, protocol, list(lockstep(feed(model, caches, block.tokens, protocol), pool)), pool)


def config_of(base: str, sinks: int, allocation: Mapping[str, int]) -> KVCacheConfig:
    """The ratequant method over a base."""
    return KVCacheConfig(method="ratequant", base=base, bit_allocation=allocation, sinks=sinks)


def dearer_uniform(method: str, sinks: int, target: float, length: int, head_dim: int) -> KVCacheConfig | None:
    """The cheapest uniform configuration of a method that costs more than the target, None if it has none."""
    steps: list[dict[str, Any]] = [{}] if method == "ternary" else [{"code_bits": bits} for bits in range(1, 9)]
    for step in steps:
        config = KVCacheConfig(method=method, sinks=sinks, **step)
        cost = config.quantizer("keys", None).bits_per_value(head_dim)
        if (cost * (length - sinks) + 16 * sinks) / length > target:
            return config
    return None


def row(name: str, kld: NDArray[np.float64], bits: float, ours: NDArray[np.float64] | None) -> str:
    """One line of the table; the difference is the other's divergence minus ours: above zero, ours is better."""
    line = f"| {name:<28} | {bits:7.4f} | {kld.mean():7.4f} |"
    if ours is None:
        return f"{line} |"
    gain = mean_interval(kld - ours, "nats/token")
    return f"{line} {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] |"


def main() -> None:
    """Print one table per text and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", nargs="+", default=["wikitext-2", "gutenberg"])
    parser.add_argument("--targets", nargs="+", type=float, default=[3.0, 2.0, 1.5])
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--base", default="turboquant_static")
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--unit", default="head", choices=["layer", "layer_kv", "head"])
    parser.add_argument("--weighting", default="coherent", choices=["coherent", "token", "product"])
    parser.add_argument("--calibration", default="wikitext-2", help="text whose calibration part is used")
    parser.add_argument("--sensitivities", type=Path, help="file to load them from, or to save them to")
    options = parser.parse_args()

    model, tokenizer = load_model(resolve_model(options.model))
    if options.sensitivities and options.sensitivities.exists():
        sensitivities = Sensitivities.load(options.sensitivities)
    else:
        texts = [load_text(options.calibration, "calibration").joined]
        sensitivities = calibrate_layer_sensitivities(model, tokenizer, texts=texts)
        if options.sensitivities:
            sensitivities.save(options.sensitivities)
    base = make_options(options.base, {})
    widths = [bits for bits in base.widths if bits <= 6]
    curves = fit_distortion_curve(
        sensitivities,
        lambda bits: base.quantizer("keys", bits, 0),
        widths=widths,
        sinks=options.sinks,
        weighting=options.weighting,
    )
    protocol = Chunked(sequences=options.sequences, length=options.length)
    with worker_pool() as pool:
        for text in options.texts:
            place = bench(model, tokenizer, text, protocol, pool)
            for target in options.targets:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # the realised cost is in the table
                    allocation = allocate_bits_ratequant(
                        curves, target, widths[0], widths[-1], unit=options.unit, at_tokens=options.length
                    )
                print(f"\n{text}, target {target:g}: {allocation.histogram}, forecast {allocation.forecast_nats:.4f}")
                print("| arm | bits per value | KLD | worse than RateQuant by |\n|---|---|---|---|")
                ours, bits = place.measure(config_of(options.base, options.sinks, allocation))
                print(row("ratequant", ours, bits, None), flush=True)
                control = [
                    place.measure(config_of(options.base, options.sinks, shuffled(allocation, seed)))
                    for seed in range(options.shuffles)
                ]
                if control:
                    klds = np.stack([kld for kld, _ in control])
                    beaten = int((klds.mean(axis=1) > ours.mean()).sum())
                    name = f"mean of {len(control)} shuffles ({beaten} worse)"
                    print(row(name, klds.mean(axis=0), control[0][1], ours), flush=True)
                head_dim = sensitivities.heads[0].head_dim
                for method, sinks in ((options.base, options.sinks), ("turboquant_mse", 0), ("ternary", 0)):
                    config = dearer_uniform(method, sinks, target, options.length, head_dim)
                    if config is not None:
                        kld, bits = place.measure(config)
                        print(row(f"uniform {method}", kld, bits, ours), flush=True)


if __name__ == "__main__":
    main()
