"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option("--model", help="A name from `veloxbench models`, an mlx-lm directory or a hub id.")
]
AcceptLicence = Annotated[
    bool, typer.Option("--accept-licence", help="Consent to the licence of a model that asks for it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
PageFile = Annotated[Path | None, typer.Option("--out", help="Write the page here, its plot beside it.")]
CheckedPage = Annotated[
    Path | None, typer.Option("--check", help="Compare with this page and its plot; exit 1 if one is stale.")
]
