"""The figures in docs/quantizers.md are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from veloxquant_mlx.methods import METHODS
from veloxquant_mlx.quantizers.affine import Affine
from veloxquant_mlx.quantizers.ternary import Ternary
from veloxquant_mlx.quantizers.turboquant_mse import TurboQuantMSE
from veloxquant_mlx.quantizers.turboquant_static import TurboQuantStatic

PAGE = (Path(__file__).parents[2] / "docs" / "quantizers.md").read_text(encoding="utf-8")


def row(label: str) -> list[float]:
    """The eight figures of a row of the distortion table."""
    (cells,) = re.findall(rf"^\| {re.escape(label)} \|((?: [\d.]+ \|){{8}})$", PAGE, re.MULTILINE)
    return [float(cell) for cell in cells.strip(" |").split("|")]


def test_the_distortion_table_is_computed() -> None:
    """Rows with a closed form equal the codebooks' distortions to the last digit shown."""
    mse = [TurboQuantMSE(bits).expected_distortion(128) for bits in range(1, 9)]
    prod = [(np.pi / 2 - 1 / 128) * d for d in (1.0, *mse[:-1])]
    static = [TurboQuantStatic(bits).expected_distortion(128) for bits in range(1, 9)]
    rows = {
        "Shannon bound 4^(−b)": [4.0**-bits for bits in range(1, 9)],
        "`turboquant_mse`": mse,
        "`turboquant_prod`": prod,
        "`turboquant_static`": static,
        "`affine`, `kivi`": [Affine(bits, 32).expected_distortion(128) for bits in range(1, 9)],
    }
    for label, expected in rows.items():
        assert row(label) == pytest.approx(expected, abs=6e-6)
    assert f"leaves {Ternary().expected_distortion(128):.5f} at".replace(" 0.", " .") in PAGE


def test_every_method_is_on_the_page() -> None:
    """Each registered method has a row in the table of costs."""
    for method in METHODS:
        assert re.search(rf"^\| `{method}` \|", PAGE, re.MULTILINE), method
