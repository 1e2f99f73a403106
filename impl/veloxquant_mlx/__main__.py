"""``python -m veloxquant_mlx archive FILE`` and ``restore FILE``: prompt caches on disk, small and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from veloxquant_mlx.command import CONSOLE, run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prompt caches of mlx-lm on disk, small and back.")

File = Annotated[Path, typer.Argument(help="a prompt cache, as mlx_lm.cache_prompt or save_prompt_cache wrote it")]
Model = Annotated[str, typer.Option(help="folder of its model in mlx-lm's form, or the model's name on the hub")]
Out = Annotated[Path, typer.Option(help="the file to write, .safetensors")]
Calibration = Annotated[Path, typer.Option(help="what `python -m veloxquant_mlx.calibration` wrote for the model")]


@app.command()
def archive(file: File, model: Model, calibration: Calibration, out: Out) -> None:
    """Write a prompt cache anew at the bits of a calibration, which is needed to read it again: keep it.

    What is written loads with veloxquant_mlx.cache.base.load_prompt_cache, and `restore` makes mlx-lm's own of it.
    """
    from veloxquant_mlx.archive import archive as write
    from veloxquant_mlx.calibration.fisher_klt import FisherCode

    code = FisherCode.load(calibration.resolve())
    _say(out, write(file, out, code, _loaded(model)))


@app.command()
def restore(file: File, model: Model, out: Out, calibration: Calibration | None = None) -> None:
    """Write an archived prompt cache anew as mlx-lm's own, fp16 and decoded, for anything that reads these."""
    from veloxquant_mlx.archive import restore as write
    from veloxquant_mlx.calibration.fisher_klt import FisherCode

    code = None if calibration is None else FisherCode.load(calibration)  # found by its hash while it is held
    _say(out, write(file, out, _loaded(model)))
    del code


def _loaded(model: str) -> Any:
    import mlx_lm

    return mlx_lm.load(model)[0]


def _say(out: Path, done: Any) -> None:
    CONSOLE.print(
        f"{out}: {done.nbytes_after / 1e6:.2f} MB for {done.nbytes_before / 1e6:.2f} MB, {done.tokens} tokens, "
        f"{done.seconds:.1f} s",
        markup=False,
    )


if __name__ == "__main__":
    run(app, "veloxquant_mlx", "what is written is written whole; type the same command again")
