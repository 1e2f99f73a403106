"""``veloxbench recommend``: which cache to use, at what cost, and how."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from veloxbench.cli.options import AsJson, ModelOption
from veloxbench.cli.output import above_zero, to_stderr
from veloxbench.errors import ExitCode, UsageError
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.record import Record

MLX_AFFINE = "mlx-affine"
_SIZES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_COUNTS = {"": 1, "k": 1024, "m": 1024**2}


def _number(text: str, units: dict[str, int], option: str, example: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.strip().lower())
    try:
        number = float(match[1]) * units[match[2]] if match else float("nan")
    except (ValueError, KeyError):
        number = float("nan")
    if not 1 <= number < 2**63:
        raise UsageError(f"{option} {text!r} is no size; write it as in {option} {example}")
    return int(number)


def recommend(
    model: ModelOption,
    context: Annotated[
        str | None, typer.Option(help="Tokens of one sequence, `32k`; by default what the model was made for.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What weights, cache and working memory may take at the peak: `8GB`, `6GiB`.")
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(callback=above_zero, help="The most nats a token that may be lost, by the interval's upper end."),
    ] = None,
    min_verdict: Annotated[
        str | None, typer.Option(help="The worst verdict to accept: **lossless**, **good**, **noticeable**.")
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            callback=above_zero, help="The least decode speed as a share of fp16's, by the interval's lower end."
        ),
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="Folders or files of records; by default `results`, if it is there, and those that ship."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the model first (profile `recommend`, into `results`).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which cache to use for a model, what it costs, what would not fit, and how to use it.

    A bound on quality gives the smallest cache that keeps it; a memory limit alone gives the best quality that fits;
    neither gives the smallest cache that is `good`. Figures come from records: nothing is guessed from a bit width.

    **Examples**

    `veloxbench recommend --model smollm2-135m`

    `veloxbench recommend --model smollm2-135m --memory 1GB --context 8k`

    `veloxbench recommend --model ~/models/mine --min-verdict noticeable --speed 0.5 --measure`
    """
    from veloxbench.inputs.models import known_models, resolve_model
    from veloxbench.measure.machine import hardware
    from veloxbench.records.quality_words import word_named
    from veloxbench.records.selection import read_folders, shipped_records
    from veloxbench.report.recommend import Wish, recommend
    from veloxbench.report.recommend_page import answer_as_json, render_answer

    verdict = None if min_verdict is None else word_named(min_verdict)
    wanted = None if context is None else _number(context, _COUNTS, "--context", "32k")
    limit_bytes = None if memory is None else _number(memory, _SIZES, "--memory", "8GB")
    folder = Path("results")
    if measure:
        _measure(model, folder)
    paths = records or [*([folder] if folder.exists() else []), *shipped_records()]
    known, handle = known_models().get(model), None
    if known is None or measure:
        handle = resolve_model(model)
    limit = handle.context if handle is not None else known.context if known is not None else 0
    name = model if handle is None else handle.name
    of_model = [
        record
        for record in read_folders(paths)[0]
        if record.subject.model.n_layers is None
        and (record.subject.model.name == name if handle is None else _same_weights(record, handle.weights_sha256))
    ]
    chip = str(hardware()["chip"])
    answer = recommend(name, of_model, Wish(wanted or limit, limit_bytes, max_kld, verdict, speed), limit, chip)
    how = [] if answer.choice is None else lines_of_use(model, answer.choice.arm, memory is not None)
    if as_json:
        print(json.dumps(answer_as_json(answer, how, chip), indent=1))
    else:
        print(render_answer(answer, how, chip), end="")
    if answer.choice is None:
        to_stderr("veloxbench: nothing that was measured keeps the wish")
        raise typer.Exit(1)


def _same_weights(record: Record, weights_sha256: str) -> bool:
    return record.subject.model.weights_sha256 == weights_sha256


def _measure(model: str, out: Path) -> None:
    """The profile ``recommend`` on a model, into the folder that is read afterwards, where what is recorded stays.

    An arm that fails is named by the run and is no candidate; the others are.
    """
    from veloxbench.cli.run import run

    try:
        run(profile="recommend", models=model, out=out)
    except typer.Exit as left:
        if left.exit_code not in (0, ExitCode.REGRESSION):
            raise


def lines_of_use(model: str, arm: Arm, bounded: bool) -> list[str]:
    """Three lines of Python, where the cache needs no more, and the command.

    Args:
        model: as it is named on the command line.
        arm: the cache.
        bounded: whether the peak matters: prompts are then read in the steps in which it was measured.
    """
    from veloxbench.measure.memory_process import PREFILL_CHUNK
    from veloxbench.methods.veloxquant import configuration

    words = ["veloxbench", "generate", "--model", model, "--cache", str(arm), "--prompt", "Hello"]
    command = shlex.join([*words, *(["--prefill-step-size", str(PREFILL_CHUNK)] if bounded else [])])
    load = ["import mlx_lm", f'model, tokenizer = mlx_lm.load("{_directory(model)}")']
    if arm.name in (REFERENCE.name, MLX_AFFINE):
        options = "" if arm.target is None else _affine_options(arm)
        python = [*load, f'print(mlx_lm.generate(model, tokenizer, prompt="Hello"{options}))']
    elif (arguments := configuration(arm)) is not None:
        python = [
            "from veloxquant_mlx import KVCacheConfig, attach  # before mlx_lm",
            *load,
            f"attach(model, KVCacheConfig({', '.join(arguments)}))  # from here on mlx-lm builds these caches",
        ]
    else:
        python = [
            "from veloxbench.run.use import load  # calibrates once, then attaches",
            "import mlx_lm",
            f'model, tokenizer = load("{model}", "{arm}")',
        ]
    return [*python, "", f"$ {command}"]


def _affine_options(arm: Arm) -> str:
    """mlx-lm's own options for its quantized cache from the first token on, as it was measured."""
    return f", kv_bits={arm.target:g}, kv_group_size={arm.parameters.get('group_size', 64)}, quantized_kv_start=0"


def _directory(model: str) -> str:
    from veloxbench.inputs.models import known_models

    known = known_models().get(model)
    return model if known is None else str(known.directory)
