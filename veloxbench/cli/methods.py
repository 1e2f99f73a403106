"""``veloxbench methods``: what can be measured."""

from __future__ import annotations

from veloxbench.cli.output import print_table


def methods() -> None:
    """The caches that can be measured, and what a target means to each."""
    from veloxbench.methods.registry import all_methods

    rows = [
        (
            method.name,
            method.summary,
            ", ".join(f"{target:g}" for target in method.targets or ()) or "none",
            method.target_means or "",
            ", ".join(f"{name}={value}" for name, value in method.parameter_defaults().items()),
        )
        for method in all_methods().values()
    ]
    print_table(("method", "what", "targets", "a target is", "parameters"), rows)
