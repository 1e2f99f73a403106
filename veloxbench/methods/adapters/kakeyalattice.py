"""kakeyalattice: lattice codecs for a PyTorch cache."""

from __future__ import annotations

from typing import Any

from veloxbench.errors import UsageError
from veloxbench.methods.peers import entry
from veloxbench.methods.registry import BuildContext


@entry()
def cache(context: BuildContext, target: None) -> list[Any]:
    """``KakeyaLatticeCache``, which is a cache of transformers, in PyTorch."""
    raise UsageError("its one cache (kakeyalattice.hf.KakeyaLatticeCache) is PyTorch's: it has none that runs on MLX")
