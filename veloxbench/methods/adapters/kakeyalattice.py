"""kakeyalattice: lattice codecs for a PyTorch cache."""

from __future__ import annotations

from typing import Any

from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext


@entry()
def cache(context: BuildContext, target: None) -> list[Any]:
    """``KakeyaLatticeCache``, which is one of PyTorch's transformers."""
    from kakeyalattice.hf import KakeyaLatticeCache

    return [KakeyaLatticeCache() for _ in context.model.layers]
