"""Fixtures of the reference implementation's tests."""

from __future__ import annotations

from typing import Any

import pytest

import veloxquant_mlx  # noqa: F401  (a BLAS before MLX)


@pytest.fixture(scope="session")
def llama_model() -> Any:
    from impl_inputs import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="session")
def gemma_model() -> Any:
    from impl_inputs import tiny_gemma3

    return tiny_gemma3()
