"""VeloxQuant-MLX: every method of its configuration, with any of its fields as parameters."""

from __future__ import annotations

import importlib
from typing import Any

from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext


def _built(context: BuildContext, method: str, **fields: Any) -> list[Any]:
    theirs = importlib.import_module("veloxquant_mlx")  # in the peer's environment: the name is this project's too
    return list(theirs.KVCacheBuilder.for_model(context.model, theirs.KVCacheConfig(method=method, **fields)))


@entry()
def default(context: BuildContext, target: None, *, method: str = "turboquant_rvq", **fields: Any) -> list[Any]:
    """Any method by its name (``method=kivi``), at its own defaults but for the fields that are given."""
    return _built(context, method, **fields)


@entry(targets=(1, 2, 3, 4))
def turboquant_rvq(context: BuildContext, target: float, *, seed: int = 42, **fields: Any) -> list[Any]:
    """``turboquant_rvq``, the recommended default, at a width."""
    return _built(context, "turboquant_rvq", bit_width_inlier=int(target), seed=seed, **fields)


@entry(targets=(2, 4, 8))
def kivi(context: BuildContext, target: float, **fields: Any) -> list[Any]:
    """``kivi``, recommended for quality, at a width."""
    return _built(context, "kivi", bit_width_inlier=int(target), **fields)


@entry(targets=(1, 2))
def vecinfer(context: BuildContext, target: float, **fields: Any) -> list[Any]:
    """``vecinfer`` with 8-bit codebooks of 8 channels (one bit a value) or of 4 (two bits)."""
    channels = 8 // int(target)
    return _built(
        context,
        "vecinfer",
        key_sub_dim=channels,
        value_sub_dim=channels,
        key_codebook_bits=8,
        value_codebook_bits=8,
        **fields,
    )
