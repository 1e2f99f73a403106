"""``veloxbench generate``, ``chat`` and ``serve``: mlx-lm's own commands, with the caches of an arm."""

from __future__ import annotations

from typing import Annotated

import typer

from veloxbench.cli.options import ModelOption
from veloxbench.cli.output import to_stderr
from veloxbench.records.arm import Arm

HANDS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command whose other options are mlx-lm's."""

CacheOption = Annotated[
    str, typer.Option("--cache", help="A method from `veloxbench methods`, as `turboquant_mse@4:sinks=4`.")
]


def generate(context: typer.Context, model: ModelOption, cache: CacheOption) -> None:
    """Generate text with quantized caches: `mlx_lm.generate`, all of whose other options pass through.

    The end says what the caches hold, beside fp16, and the peak of memory.

    **Examples**

    `veloxbench generate --model smollm2-135m --cache turboquant_mse@4 --prompt "The capital of France is"`

    `veloxbench generate --model M --cache turboquant_mse@4 -- --help` lists mlx-lm's options.
    """
    _run("generate", context, model, cache)


def chat(context: typer.Context, model: ModelOption, cache: CacheOption) -> None:
    """Chat with quantized caches: `mlx_lm.chat`, all of whose other options pass through.

    Each turn ends with what the caches hold, beside fp16, and the peak of memory.

    **Example:** `veloxbench chat --model M --cache turboquant_mse@4:sinks=4 --max-tokens 512`
    """
    _run("chat", context, model, cache)


def serve(context: typer.Context, model: ModelOption, cache: CacheOption) -> None:
    """Serve with quantized caches: `mlx_lm.server`, all of whose other options pass through.

    Batches, the reuse of prompts and draft models work as with mlx-lm's own caches. Each answer is followed by what its
    caches hold, beside fp16, and the peak of memory.

    **Example:** `veloxbench serve --model M --cache turboquant_mse@4 --port 8080`
    """
    _run("server", context, model, cache)


def _run(name: str, context: typer.Context, model: str, cache: str) -> None:
    arm = Arm.parse(cache)
    from veloxbench.run.use import mlx_lm_command

    mlx_lm_command(name, model, arm, context.args, to_stderr)
