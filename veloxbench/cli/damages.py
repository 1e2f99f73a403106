"""``veloxbench damages``: the quality gate tried on damage of known size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veloxbench.errors import UsageError

STUDY = Path("records/gate/damages.json")


def damages(
    study: Annotated[Path, typer.Option(help="The measured study.")] = STUDY,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure it anew with the profile's model, text and protocol.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="With --measure: only what the study lacks.")] = False,
    profile: Annotated[str, typer.Option(help="Gives model, text, protocol and the number of arms.")] = "gate",
    out: Annotated[Path | None, typer.Option(help="Write the page here instead of standard output.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Compare with this page and its plot; exit 1 if one is not what the study says.")
    ] = None,
) -> None:
    """How much damage does the quality gate notice? True sizes on four gates' sequences, verdicts on one gate's each.

    **Examples**

    `veloxbench damages --check docs/damages.md`

    `veloxbench damages --measure --study mine.json`
    """
    from veloxbench.cli.pages import deliver
    from veloxbench.inputs.models import resolve_model
    from veloxbench.inputs.transfer_progress import default_reporter
    from veloxbench.measure.protocol import Chunked
    from veloxbench.measure.suite import get_suite
    from veloxbench.records.journal import write_text
    from veloxbench.run.grid import load_grid
    from veloxbench.trials.damages import Study, journal_of, reaches, trials
    from veloxbench.trials.damages import measure as measure_study
    from veloxbench.trials.damages_page import PLOT, plot, render

    grid = load_grid(profile)
    if measure:
        protocol = next((p for p in grid.tasks(get_suite("perplexity")) if isinstance(p, Chunked)), None)
        if protocol is None:
            raise UsageError(f"profile {profile!r} has no chunked protocol to measure damages with")
        reporter = default_reporter()
        handle = resolve_model(grid.models[0], reporter=reporter)
        journal = study.with_suffix(".part")
        if add and study.exists() and not journal.exists():
            write_text(journal, journal_of(Study.model_validate_json(study.read_text(encoding="utf-8"))))
        measured = measure_study(handle, grid.corpus, protocol, journal, reporter)
        write_text(study, measured.model_dump_json(indent=1) + "\n")
        journal.unlink()
    if not study.exists():
        raise UsageError(f"there is no study at {study}; `veloxbench damages --measure --study {study}` makes one")
    found = Study.model_validate_json(study.read_text(encoding="utf-8"))
    n_arms = len(grid.arm_list())
    judged = trials(found, n_arms)
    detectable = reaches(found, judged, n_arms)
    page = render(found, judged, detectable, n_arms)
    deliver(page, out, check, "veloxbench damages", study, {PLOT: plot(judged, detectable)})
