"""Choose widths by hand and give outlier tokens 8 bits: ``python examples/mixed_precision.py [MODEL]``."""

import sys

import veloxquant_mlx  # noqa: F401  (first of all: on Linux it puts a fast BLAS under MLX)

# isort: split
import mlx_lm

from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
from veloxquant_mlx.observers.key_norm import KeyNormObserver

MODEL = sys.argv[1] if len(sys.argv) > 1 else "mlx-community/Llama-3.2-3B-Instruct-4bit"
PROMPT = "A key-value cache grows with every token, because attention reads all of them again. " * 8

model, tokenizer = mlx_lm.load(MODEL)
n_layers = len(model.layers)

bit_allocation = {f"layer_{i}": 1 for i in range(n_layers)}
for i in range(n_layers // 4, n_layers // 2 + 1):
    bit_allocation[f"layer_{i}"] = 4
config = KVCacheConfig(method="ratequant", bit_allocation=bit_allocation, value_bits=2)
cache = KVCacheBuilder.build(model, config)
print(mlx_lm.generate(model, tokenizer, prompt=PROMPT, prompt_cache=cache, max_tokens=16))

observer = KeyNormObserver(outlier_threshold=3.0, window_size=256)  # > 3σ from the rolling mean norm
config = KVCacheConfig(method="ratequant", bit_allocation=bit_allocation, outlier_observer=observer, outlier_bits=8)
cache = KVCacheBuilder.build(model, config)
print(mlx_lm.generate(model, tokenizer, prompt=PROMPT, prompt_cache=cache, max_tokens=16))
report = observer.report()
print(report.outlier_count, report.outlier_fraction, report.mean_outlier_norm)
