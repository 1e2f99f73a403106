"""Models in use: loaded by mlx-lm, with an arm's caches attached, through mlx-lm's own commands, and what they hold."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from rich.filesize import decimal

from veloxbench.errors import Stopped, UnfitEnvironmentError, UsageError
from veloxbench.inputs.models import resolve_model
from veloxbench.inputs.sources import cache_dir
from veloxbench.inputs.transfer_progress import default_reporter
from veloxbench.measure.account import held_arrays
from veloxbench.methods.attached import attach_arm
from veloxbench.methods.registry import BuildContext, Geometry, geometry
from veloxbench.records.arm import Arm

Say = Callable[[str], None]

REFUSED = ("--kv-bits", "--kv-group-size", "--quantized-kv-start", "--max-kv-size", "--prompt-cache-file")
"""mlx-lm's options that say which caches to use: ``--cache`` does that here, and they would have no effect."""


STOPPED = {
    "generate": "the text so far stands above, and nothing else is kept; the same command begins it anew",
    "chat": "the conversation was in memory alone; the same command opens a new one",
    "server": "the server has stopped, and the prompts that it stored are gone; the same command starts it again",
}
"""What is left of one of mlx-lm's commands when Ctrl-C ends it, by the command's name."""
NOT_READY = "the model was not ready yet; finished downloads and calibrations are kept, and the same command goes on"


@dataclass(frozen=True)
class Resident:
    """What caches hold for their tokens.

    Attributes:
        tokens: of the longest layer.
        held: bytes in use, every array counted.
        fp16: bytes that the same tokens would take in fp16.
    """

    tokens: int
    held: float
    fp16: int

    def __str__(self) -> str:
        smaller = f", {self.fp16 / self.held:.1f} times as much" if self.held else ""
        return f"{self.tokens:,} tokens in {decimal(round(self.held))} (fp16: {decimal(self.fp16)}{smaller})"


def resident(caches: Sequence[Any], shapes: Sequence[Geometry | None]) -> Resident:
    """What the attention layers hold.

    Args:
        caches: one per layer, of one sequence.
        shapes: of the model's layers, None for those that are no plain attention, which are left out.
    """
    tokens, held, fp16 = 0, 0.0, 0
    for cache, shape in zip(caches, shapes, strict=False):  # a draft model's caches may follow
        if shape is not None:
            seen = int(cache.offset)
            kept = min(seen, getattr(cache, "max_size", None) or seen)
            tokens = max(tokens, seen)
            held += sum(array.used_bytes for array in held_arrays(cache))
            fp16 += 2 * kept * shape.n_values
    return Resident(tokens, held, fp16)


class Loader:
    """Loads models as mlx-lm does, by our names too, and attaches an arm's caches to each, to a draft model as well.

    Attributes:
        last: the caches that were made last for the model that was loaded first; its answers are read from them.
    """

    def __init__(self, arm: Arm, load: Callable[..., tuple[Any, ...]]) -> None:
        self.arm = arm
        self.load = load
        self.shapes: list[Geometry | None] = []
        self.last: list[Any] = []

    def __call__(self, path: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What ``mlx_lm.load`` returns."""
        handle = resolve_model(str(path), reporter=default_reporter())
        loaded = self.load(str(handle.directory), *args, **kwargs)
        model, tokenizer = loaded[:2]
        shapes = geometry([], model)
        context = BuildContext(model, tokenizer, handle.weights_sha256, None, cache_dir() / "calibration")
        hook = attach_arm(context, self.arm)
        if not self.shapes:
            self.shapes, made = shapes, hook.build

            def build() -> list[Any]:
                self.last = made()
                return self.last

            hook.build = build
        return loaded


def load(model: str, cache: str) -> tuple[Any, Any]:
    """Model and tokenizer as ``mlx_lm.load`` returns them, with the caches of an arm attached.

    Args:
        model: a name of ``veloxbench models``, an mlx-lm directory or a hub id.
        cache: an arm, as ``turboquant_mse@4:sinks=4`` or ``ratequant@2``; a method that calibrates does so now, once.

    Raises:
        UsageError: an arm that does not exist or does not fit the model.
    """
    import mlx_lm

    model_and_tokenizer = Loader(Arm.parse(cache), mlx_lm.load)(model)
    return model_and_tokenizer[0], model_and_tokenizer[1]


def mlx_lm_command(name: str, model: str, arm: Arm, options: Sequence[str], say: Say) -> None:
    """Run mlx-lm's own ``generate``, ``chat`` or ``server`` on a model with an arm's caches.

    Args:
        name: of mlx-lm's command.
        model: as for :func:`load`.
        arm: whose caches are attached to every model that the command loads.
        options: handed on as they are.
        say: is told what the caches hold: at the end, after each turn, after each answer of the server.

    Raises:
        UsageError: an option that chooses caches, or one that mlx-lm refuses.
        UnfitEnvironmentError: mlx-lm ended in an error.
    """
    for option in options:
        if option.split("=")[0] in REFUSED:
            raise UsageError(f"{option.split('=')[0]} and --cache both choose the caches: leave one out")
    module = importlib.import_module(f"mlx_lm.{name}")
    loader = Loader(arm, module.load)

    def report(caches: Sequence[Any] | None = None) -> None:
        held = resident(loader.last if caches is None else caches, loader.shapes)
        say(f"{arm}: {held}; peak memory {decimal(mx.get_peak_memory())}, weights included")

    replaced = {"load": loader, **_reporting(name, module, report)}
    with _replaced(module, replaced), _arguments(f"mlx_lm.{name}", ["--model", model, *options]):
        try:
            module.main()
        except SystemExit as error:  # argparse has said what is wrong
            if error.code:
                raise UsageError(f"mlx_lm.{name} refused its options") from error
            return
        except EOFError:
            pass  # the end of a chat whose input is a file
        except KeyboardInterrupt:
            if loader.last and name == "generate":
                report()
            raise Stopped(STOPPED[name] if loader.shapes else NOT_READY) from None
        except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
            if isinstance(error, UsageError | UnfitEnvironmentError):
                raise
            raise UnfitEnvironmentError(f"mlx_lm.{name} failed: {type(error).__name__}: {error}") from error
    if name == "generate":
        report()
    elif name == "server":
        say(STOPPED[name])


def _reporting(name: str, module: Any, report: Callable[..., None]) -> dict[str, Any]:
    """Classes of a command's module that report after what they do."""
    if name == "chat":

        class Turns(module.ChatUI):  # type: ignore[misc]
            """mlx-lm's screen; a turn ends with what the caches hold."""

            def end_turn(self, response: Any) -> None:
                super().end_turn(response)
                report()

        return {"ChatUI": Turns}
    if name == "server":

        class Prompts(module.LRUPromptCache):  # type: ignore[misc]
            """mlx-lm's store of prompts; what a request leaves in it is said."""

            def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **kind: Any) -> None:
                report(prompt_cache)
                super().insert_cache(model, tokens, prompt_cache, **kind)

        return {"LRUPromptCache": Prompts}
    return {}


@contextmanager
def _replaced(module: Any, names: Mapping[str, Any]) -> Iterator[None]:
    """Names of a module that mean something else for the length of a block."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def _arguments(program: str, options: Sequence[str]) -> Iterator[None]:
    """``sys.argv`` as the command finds it, for the length of a block."""
    before, sys.argv = sys.argv, [program, *options]
    try:
        yield
    finally:
        sys.argv = before
