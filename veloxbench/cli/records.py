"""``veloxbench merge``: several folders of records made into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders or .jsonl files of records.")],
    out: Annotated[Path, typer.Option(help="Folder for all of them; what it holds already is one of the folders.")],
) -> None:
    """Make one run of several folders: the shards of a grid, or the records of several machines.

    A cell that stands in two of them must have the same figures; otherwise nothing is written.

    **Example:** `veloxbench merge part1 part2 --out results`
    """
    from veloxbench.records.merge import merged, write
    from veloxbench.records.store import JOURNAL, open_store
    from veloxbench.report.files import PAGE, write_pages

    own = [out] if (out / JOURNAL).exists() else []
    together = merged([*own, *folders])
    with open_store(out) as store:
        added = write(together, store)
        write_pages(out, store)
    print(f"{added} records added, {len(together.records)} in {out}; tables in {out / PAGE}")
