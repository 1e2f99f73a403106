"""``veloxbench models`` and ``veloxbench corpora``: what can be measured on."""

from __future__ import annotations

from typing import Annotated

import typer

from veloxbench.cli.options import AcceptLicence
from veloxbench.cli.output import print_table
from veloxbench.errors import UsageError, unknown_name


def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models to show (default: all that are known by name).")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch, verify and convert the named models now.")
    ] = False,
    accept_licence: AcceptLicence = False,
) -> None:
    """The models known by name: licence, size, source. Any mlx-lm directory or hub id works in their place.

    **Example:** `veloxbench models --download smollm2-135m`
    """
    from veloxbench.inputs.models import known_models, resolve_model
    from veloxbench.inputs.transfer_progress import default_reporter

    known = known_models()
    if download:
        for name in names or []:
            handle = resolve_model(name, reporter=default_reporter(), accept_licence=accept_licence)
            print(f"{handle.name}: {handle.directory} (weights sha256 {handle.weights_sha256[:16]}…)")
        if not names:
            raise UsageError("name the models to download, for example: veloxbench models --download smollm2-135m")
        return
    for name in names or []:
        if name not in known:
            raise unknown_name("model", name, known)
    rows = [
        (
            spec.name,
            spec.architecture,
            f"{spec.context}",
            f"{spec.download_nbytes / 1e6:.0f} MB",
            spec.licence + (" (opt-in)" if spec.opt_in else ""),
            "yes" if spec.is_cached else "no",
            spec.source,
        )
        for spec in known.values()
        if not names or spec.name in names
    ]
    print_table(("model", "architecture", "context", "download", "licence", "here", "source"), rows)


def corpora() -> None:
    """The texts known by name, with licences. Any .txt, .jsonl or .parquet file or hub dataset works in their place."""
    from veloxbench.inputs.corpora import known_corpora

    rows = [
        (spec.name, spec.description, spec.licence, "yes" if spec.is_cached else "no", spec.source)
        for spec in known_corpora().values()
    ]
    print_table(("corpus", "what", "licence", "here", "source"), rows)
