"""Calibrations of tiny models, made in seconds."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from impl_inputs import tiny_gemma3, tiny_llama

from veloxquant_mlx.calibration.fisher_klt import FisherCode
from veloxquant_mlx.calibration.fitting import AGES, fit_code
from veloxquant_mlx.calibration.gradients import Split
from veloxquant_mlx.calibration.measure import Measurements, measure_model

AT_TOKENS = 300


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id = None

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(c) % 128 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def prose(n: int, seed: int = 0) -> str:
    """Lines of 59 characters drawn from the alphabet."""
    letters = np.random.default_rng(seed).integers(97, 123, n)
    return "\n".join("".join(map(chr, letters[i : i + 59])) for i in range(0, n, 59))


@functools.cache
def model_of(family: str) -> Any:
    return tiny_llama(head_dim=32) if family == "llama" else tiny_gemma3(window=40)


@functools.cache
def measurements(family: str = "llama") -> Measurements:
    return measure_model(
        model_of(family),
        Letters(),
        [prose(3000)],
        gradient_sequences=10,
        vector_sequences=18,
        split=Split(prefix=24, suffix=24, gap=4),
    )


@functools.cache
def code(scope: Any = "below", family: str = "llama", aged: bool = True, step: float = 0.01) -> FisherCode:
    """A code at a step, without a search."""
    ages = AGES if aged else ()
    return fit_code(measurements(family), step=step, scope=scope, ages=ages, at_tokens=AT_TOKENS)
