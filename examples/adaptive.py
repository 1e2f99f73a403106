"""Let every block of a model's keys choose its width by observed cosine: ``python examples/adaptive.py [MODEL]``."""

import sys

import veloxquant_mlx  # noqa: F401  (first of all: on Linux it puts a fast BLAS under MLX)

# isort: split
import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

from veloxquant_mlx.observers.distortion import DistortionObserver
from veloxquant_mlx.quantizers.turboquant_prod import TurboQuantProdAdaptive

MODEL = sys.argv[1] if len(sys.argv) > 1 else "mlx-community/Llama-3.2-3B-Instruct-4bit"

model, tokenizer = mlx_lm.load(MODEL)
tokens = tokenizer.encode("Every block of thirty-two tokens is coded at the width that it needs. " * 8)[:64]
cache = make_prompt_cache(model)
model(mx.array(tokens)[None], cache=cache)
keys, _ = cache[0].keys_and_values()

quantizer = TurboQuantProdAdaptive(base_bits=2, max_bits=4, distortion_threshold=0.05, observer=DistortionObserver())
# raises its bits while the observed cosine similarity is below 0.95
decoded = quantizer.decode(quantizer.encode(keys))
print(quantizer.observer.report().table())
