"""Calibrate a model, allocate 2.0 bits per value by RateQuant, generate: ``python examples/ratequant.py [MODEL]``."""

import sys

import veloxquant_mlx  # noqa: F401  (first of all: on Linux it puts a fast BLAS under MLX)

# isort: split
import mlx_lm

from veloxquant_mlx.allocators.ratequant import (
    allocate_bits_ratequant,
    calibrate_layer_sensitivities,
    fit_distortion_curve,
)
from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig

MODEL = sys.argv[1] if len(sys.argv) > 1 else "mlx-community/Llama-3.2-3B-Instruct-4bit"

model, tokenizer = mlx_lm.load(MODEL)
sensitivities = calibrate_layer_sensitivities(model, tokenizer, num_samples=32)
curves = fit_distortion_curve(sensitivities)
bit_allocation = allocate_bits_ratequant(curves, target_bits=2.0, min_bits=1, max_bits=4)
cache = KVCacheBuilder.build(model, KVCacheConfig(method="ratequant", bit_allocation=bit_allocation))
text = mlx_lm.generate(model, tokenizer, prompt="The three primary colours are", prompt_cache=cache)

print(text)
print(dict(bit_allocation))
print(f"{float(bit_allocation.bits_per_value):.4f} bits per value: {bit_allocation.histogram}")
