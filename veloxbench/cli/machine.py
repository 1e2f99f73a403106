"""``veloxbench doctor`` and ``veloxbench kernels``: is this machine fit, and are the kernels right on it?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from veloxbench.cli.output import print_table, to_stderr
from veloxbench.errors import ExitCode, UnfitEnvironmentError


def doctor() -> None:
    """Is this machine fit to measure on? Shows hardware, BLAS with its measured speed, versions, caches and clashes."""
    from veloxbench.run.doctor import examine

    checks = list(examine())
    signs = {True: "ok", False: "UNFIT", None: ""}
    print_table(("check", "", "found"), [(check.name, signs[check.ok], check.found) for check in checks])
    unfit = [check.name for check in checks if check.ok is False]
    if unfit:
        raise UnfitEnvironmentError(f"not fit: {', '.join(unfit)}")


def kernels(
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run every kernel here and compare it with its plain-MLX definition (a minute)."),
    ] = False,
) -> None:
    """The Metal kernels of the packed caches: their formats, where they can run here, and whether they are right.

    `--verify` runs every line of every kernel on this machine: on the Metal device if it can run, else through the
    CPU emulator, which compiles the same Metal text with the system's C++ compiler and also finds races, accesses out
    of bounds and uninitialised reads. Exit codes: 0 all agree, 1 a kernel is wrong, 5 nothing here can run them.

    **Examples**

    `veloxbench kernels` shows the kernels and their formats

    `veloxbench kernels --verify` checks them on this machine
    """
    from veloxbench.run.doctor import kernel_backends

    places = {check.name: check.found for check in kernel_backends()}
    if not verify:
        _print_kernels(places)
        return
    from veloxquant_kernels.emulator import CompilerNotFound
    from veloxquant_kernels.kernel import why_no_metal
    from veloxquant_kernels.verify import by_kernel
    from veloxquant_kernels.verify import verify as verify_kernels

    with Console(stderr=True).status("starting") as status:
        try:
            outcomes = verify_kernels(before=lambda case: status.update(f"{case.kernel}, {case.name}"))
        except CompilerNotFound as error:
            raise UnfitEnvironmentError(f"{why_no_metal()} here, and no emulator: {error}") from error
    if (problem := why_no_metal()) is not None:
        print(f"Metal cannot run here ({problem}); the CPU emulator {places['emulator']}.\n")
    results = by_kernel(outcomes)
    rows = [
        (
            result.kernel,
            result.backend,
            f"{result.n_cases}",
            "every bit" if result.error == 0 else f"{result.error:.2f} of the bound",
            "FAILED" if result.failures else "ok",
        )
        for result in results
    ]
    print_table(("kernel", "ran on", "cases", "agrees to", ""), rows)
    failures = [outcome for result in results for outcome in result.failures]
    for outcome in failures:
        reason = outcome.detail or f"error {outcome.error:.3g} times its bound"
        to_stderr(f"FAILED {outcome.kernel}, {outcome.case}: {reason}")
    raise typer.Exit(int(ExitCode.REGRESSION if failures else ExitCode.PASS))


def _print_kernels(places: dict[str, str]) -> None:
    from veloxquant_kernels.kernel import format_contract, shipped_kernels

    print_table(("backend", "here"), list(places.items()))
    kernels = shipped_kernels()
    shared = sorted({stem for kernel in kernels for stem in kernel.headers})
    for stem in (*(kernel.stem for kernel in kernels), *shared):
        contract = format_contract(stem)
        print(f"\n{stem}.metal: {contract.summary}", *contract.arrays, sep="\n  ")
