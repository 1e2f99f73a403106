"""Any registered arm as the caches that mlx-lm builds for a model, until it is detached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veloxbench.methods.registry import BuildContext, build, checked
from veloxbench.records.arm import Arm

if TYPE_CHECKING:
    from veloxquant_mlx.hook import CacheHook


def attach_arm(context: BuildContext, arm: Arm) -> CacheHook:
    """Let everything of mlx-lm that makes caches for the context's model make the arm's, calibrated if need be.

    Raises:
        UsageError: an unknown method or parameter, a target that it cannot meet, or a model that it cannot hold.
    """
    from veloxquant_mlx.hook import CacheHook  # an earlier revision, which `veloxbench compare` imports, has none

    arm = checked(arm)
    build(context, arm)  # what does not fit is said now
    return CacheHook(context.model, lambda: [cache.inner for cache in build(context, arm)[0]])
