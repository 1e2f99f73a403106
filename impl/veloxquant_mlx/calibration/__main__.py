"""``python -m veloxquant_mlx.calibration MODEL --out FILE --text FILE``: calibrate ``fisher_klt`` for a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import mlx_lm
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from veloxquant_mlx.calibration import measure
from veloxquant_mlx.calibration.fitting import AGES, fit_code
from veloxquant_mlx.calibration.gradients import SINKS
from veloxquant_mlx.calibration.measure import Measurements, measure_model
from veloxquant_mlx.command import CONSOLE, run
from veloxquant_mlx.transforms.coded_matrix import check_table_bits
from veloxquant_mlx.transforms.klt import Scope


def calibrate(
    model: Annotated[str, typer.Argument(help="folder of a model in mlx-lm's form, or its name on the hub")],
    out: Annotated[Path, typer.Option(help="where the calibration is written, a .safetensors file")],
    text: Annotated[
        list[Path] | None, typer.Option(help="text to calibrate on, best like what will be served; may be repeated")
    ] = None,
    target: Annotated[
        float, typer.Option(min=0.1, max=16, help="bits per value at --at-tokens, all but static tables counted")
    ] = 2.0,
    scope: Annotated[
        Scope, typer.Option(help="what shares a transform; below: predicted from the layer below")
    ] = "below",
    at_tokens: Annotated[int, typer.Option(min=64, help="context at which the target holds")] = 2048,
    sinks: Annotated[int, typer.Option(min=0, help="first tokens kept in fp16")] = SINKS,
    one_age: Annotated[bool, typer.Option("--one-age", help="recent tokens as coarse as old ones")] = False,
    table_bits: Annotated[
        int, typer.Option(min=2, max=16, help="bits an entry of the static tables, 16 or 2 to 8")
    ] = 16,
    gradient_sequences: Annotated[int, typer.Option(min=1, help="sequences of 1024 tokens for gradients")] = 10,
    vector_sequences: Annotated[int, typer.Option(min=3, help="sequences of 1024 tokens for keys and values")] = 24,
    measurements: Annotated[
        Path | None, typer.Option(help="keep what takes minutes here, and use it for other scopes and targets")
    ] = None,
) -> None:
    """Calibrate fisher_klt: minutes of gradients, once a model; then seconds to minutes a target.

    The calibration belongs to the model's weights: another model refuses it. FisherCode.load(FILE).caches(model) makes
    the caches.
    """
    check_table_bits(table_bits, name="--table-bits")
    loaded, tokenizer = mlx_lm.load(model)[:2]
    if measurements is not None and measurements.exists():
        measured = Measurements.load(measurements, loaded)
        measured.provenance.check_model(loaded)
    else:
        texts = None if text is None else [path.read_text(encoding="utf-8") for path in text]
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        with Progress(*columns, console=CONSOLE) as bar:
            task = bar.add_task("calibrating", total=1.0)

            def show(progress: measure.Progress) -> None:
                bar.update(task, completed=progress.done, description=progress.stage)

            measured = measure_model(
                loaded,
                tokenizer,
                texts,
                gradient_sequences=gradient_sequences,
                vector_sequences=vector_sequences,
                on_progress=show,
            )
        if measurements is not None:
            measured.save(measurements)
    made = fit_code(
        measured,
        target=target,
        scope=scope,
        sinks=sinks,
        ages=() if one_age else AGES,
        at_tokens=at_tokens,
        bits=table_bits,
        say=CONSOLE.print,
    ).save(out)
    CONSOLE.print(
        f"{out}: {made.bits_per_value:.3f} bits a value at {at_tokens} tokens, and tables of "
        f"{made.klt.nbytes / 1e6:.1f} MB ({made.klt.static_bits_per_value(at_tokens):.2f} more at that context)"
    )


def main() -> None:
    """The command, see :func:`veloxquant_mlx.command.run`."""
    go_on = "type the same command again (what --measurements has kept is not measured anew)"
    run(partial(typer.run, calibrate), "calibration", go_on)


if __name__ == "__main__":
    main()
