"""What the harness tests share: a grid of a few seconds."""

from pathlib import Path

import pytest
from small_grids import IN_MEMORY, TIMED

TINY_GRID = """
summary = "seconds"
models = ["smollm2-135m"]
corpus = "bundled"
suites = ["perplexity", "throughput"]

[[arms]]
method = "mlx-affine"
targets = [4]

[[arms]]
method = "turboquant_mse"
targets = [4, 2]

[[protocols]]
name = "chunked"
sequences = 2
length = 48
chunk = 16
score_from = 16

[[protocols]]
name = "decode"
sequences = 2
prefix = 16
steps = 4
"""


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    """A grid of a few seconds, as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_GRID + TIMED + IN_MEMORY)
    return path
