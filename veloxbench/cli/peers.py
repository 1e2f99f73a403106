"""``veloxbench peers``: caches of other projects, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veloxbench.cli.options import CheckedPage, PageFile
from veloxbench.cli.output import above_zero, deliver, print_table

peers_app = typer.Typer(
    name="peers",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Caches of other projects, each in an environment of its own, through the same protocols.",
)


@peers_app.command()
def add(
    requirement: Annotated[str, typer.Argument(help="For pip: `veloxquant-mlx==0.94.15`, a local path, a URL.")],
    adapter: Annotated[
        str | None,
        typer.Option(help="A module of the package's adapters or your own FILE.py; the one of that name, if left out."),
    ] = None,
    no_deps: Annotated[bool, typer.Option("--no-deps", help="Install the distribution alone.")] = False,
    minutes: Annotated[
        float | None, typer.Option(callback=above_zero, help="Longest time of one measurement (default 30).")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(callback=above_zero, help="Most GiB resident in one measurement (default half of the machine's)."),
    ] = None,
) -> None:
    """Install a peer into an environment of its own in the cache folder; what it does not pin is this program's.

    Its methods are arms then: `veloxbench run --methods veloxquant-mlx/turboquant_rvq@1`. Any cache class is one
    without an adapter: `--methods NAME/module.Class:bits=4`.

    **Examples**

    `veloxbench peers add veloxquant-mlx==0.94.15`

    `veloxbench peers add ./my-cache --adapter my_adapter.py`
    """
    from veloxbench.methods import peers as known

    peer = known.add(
        requirement,
        adapter=adapter,
        with_dependencies=not no_deps,
        seconds=None if minutes is None else 60 * minutes,
        memory_gib=memory,
    )
    methods = ", ".join(f"{peer.name}/{name}" for name in known.entries_of(peer)) or "no adapter: name module.Class"
    print(f"{peer.implementation} in {peer.folder}; arms: {methods}")


@peers_app.command("list")
def list_peers() -> None:
    """Every peer that is here, with the methods of its adapter."""
    from veloxbench.methods.peers import entries_of, known_peers

    rows = []
    for peer in known_peers().values():
        entries = entries_of(peer)
        for name, entry in entries.items():
            targets = ", ".join(f"{target:g}" for target in entry.targets or ())
            rows.append((peer.implementation, f"{peer.name}/{name}", targets, entry.summary))
        if not entries:
            rows.append((peer.implementation, f"{peer.name}/module.Class", "", "any cache class"))
    print_table(("peer", "method", "targets", "what"), rows)


@peers_app.command()
def remove(name: Annotated[str, typer.Argument(help="The peer's name.")]) -> None:
    """Delete a peer's environment; its records stay."""
    from veloxbench.methods import peers as known

    known.remove(name)
    print(f"{name} is removed")


@peers_app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="Folders or .jsonl files of records with arms of peers.")],
    out: PageFile = None,
    check: CheckedPage = None,
) -> None:
    """What peers claim beside what was measured, from records alone.

    **Example:** `veloxbench peers report records/peers.jsonl --out docs/peers.md`
    """
    from veloxbench.records.selection import read_folders
    from veloxbench.report.peers import render

    deliver(render(read_folders(records)[0]), out, check, "veloxbench peers report", records[0])
