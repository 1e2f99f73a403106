"""``veloxbench merge``, ``verify``, ``submit`` and ``changes``: records of several machines, other people and times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veloxbench.cli.output import print_findings, print_table, to_stderr
from veloxbench.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from veloxbench.compare.verify import Verified


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


def verify(
    records: Annotated[list[str], typer.Argument(help="Ids of records (6 characters do), or .jsonl files.")],
    folders: Annotated[
        list[Path] | None,
        typer.Option("--records", help="Where ids are looked up (default: the records that come with veloxbench)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the records' model is, if it is not known by their name.")
    ] = None,
) -> None:
    """Measure published records again on this machine and say whether they hold, and within what interval.

    Bytes and counts must be equal; quality passes the gate's paired test, which counts the noise of another machine's
    rounding. Exit codes: 0 all hold, 1 one does not, 2 too few sequences to tell.

    **Example:** `veloxbench verify 60449b7f9f fd323cebde`
    """
    from veloxbench.compare.verify import chosen_records, verified
    from veloxbench.gate.verdicts import exit_code
    from veloxbench.run.progress import LineProgress

    results = []
    for result in verified(chosen_records(records, folders or []), LineProgress(), model=model):
        print(_said(result), flush=True)
        results.append(result)
    findings = [finding for result in results for finding in result.findings]
    if not all(result.holds for result in results):
        print_findings([finding for finding in findings if not finding.passed])
    print(f"{sum(result.holds for result in results)} of {len(results)} records hold here")
    raise typer.Exit(int(exit_code(findings)))


def _said(result: Verified) -> str:
    """One line: the record, whether it holds, and the interval of each change that was judged."""
    subject = result.record.subject
    name = f"{subject.model.name} {subject.suite}/{subject.protocol} {subject.method.label}"
    changes = [
        f"{f.metric} {f.change:+.3g} [{f.low:.3g}, {f.high:.3g}], limit {f.limit:.3g}"
        for f in result.findings
        if f.change is not None and f.low is not None and f.high is not None and f.limit is not None
    ]
    exact = [f"{f.metric} equal" for f in result.findings if f.tier == "exact" and f.passed]
    word = "holds" if result.holds else "DOES NOT HOLD"
    return f"{result.record.id[:12]} {name}: {word} ({'; '.join([*exact, *changes]) or 'see below'})"


def submit(
    folder: Annotated[Path, typer.Argument(help="A folder of records, or a .jsonl file.")],
    out: Annotated[Path, typer.Option(help="Where to lay the files of a pull request out.")] = Path("submission"),
) -> None:
    """Check records that you would contribute, and lay them out as a pull request needs them.

    Each line must be whole, its hashes its own; every method must hold the layers that it claims; quality must come
    with fp16's noise floor; and all must be measured by this code, in a checkout without changes.

    **Example:** `veloxbench run && veloxbench submit results`
    """
    from veloxbench.compare.submission import PLACE, layout, problems
    from veloxbench.records.journal import write_text
    from veloxbench.records.store import journals, read_records
    from veloxbench.report.page import hardware_table

    if not journals(folder):
        raise UsageError(f"there are no records at {folder}")
    records = read_records(folder)
    wrong = problems(records)
    for problem in wrong:
        to_stderr(problem)
    if wrong:
        print(f"{len(wrong)} problems in {len(records)} records: nothing was written")
        raise typer.Exit(int(ExitCode.REGRESSION))
    files = layout(records)
    text = (
        f"# {len(records)} records\n\n{hardware_table(records)}\n\nEach record was checked by `veloxbench submit`. "
        f"`veloxbench verify {' '.join(map(str, files))}` measures them again.\n"
    )
    for path, content in {**files, Path("PULL_REQUEST.md"): text}.items():
        write_text(out / path, content)
        print(f"wrote {out / path}")
    print(f"copy {out / PLACE} into a checkout's {PLACE} and commit it; PULL_REQUEST.md is the request's text")


def changes(
    records: Annotated[
        list[Path] | None, typer.Argument(help="Folders or .jsonl files of records (default: results).")
    ] = None,
) -> None:
    """Show since which commit a stored figure is another one: the change points of every row.

    A folder keeps the records of earlier code. Of each row (one cache with one model, text and settings, on one machine
    with one rounding) the records are taken in the order in which they were measured, and neighbours whose code differs
    are compared: bytes and codes have changed if they are not equal, KLD if the gate's paired test over sequences says
    so. Under the table stand the commands that find the commit behind a regression.

    Noise alone shows a change in one folder of a hundred at most. The last line says what was left out, and why. Exit
    code 0, whatever changed: `veloxbench gate` judges.

    **Example:** `veloxbench run --profile gate`, the same again after a pull, then `veloxbench changes results`
    """
    from veloxbench.gate.changes import change_points
    from veloxbench.records.selection import by_machine
    from veloxbench.records.store import journals, no_records
    from veloxbench.report.history import CHANGE_COLUMNS, bisection, change_cells, judged_changes, read_history

    paths = records or [Path("results")]
    for path in paths:
        if not journals(path):
            raise no_records(path)
    history = read_history(paths)
    found = change_points(history)
    if not found.compared and not found.left_out:
        where = ", ".join(map(str, paths))
        print(f"no row in {where} has records of two states of the code: run the same again after a change of code")
        return
    if found.changes:
        several = len(by_machine(history)) > 1
        rows = [(change.after.subject.model.name, *change_cells(change, several)) for change in found.changes]
        print_table(("model", *CHANGE_COLUMNS), rows)
        for command in dict.fromkeys(said for said, is_command in map(bisection, found.changes) if is_command):
            print(command)
    print(judged_changes(found))
