"""Records that somebody contributes: may they be published, and as which files?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from veloxbench.compare.verify import inconsistent
from veloxbench.gate.baselines import subject_name
from veloxbench.measure.quality import FLOOR_LIMIT
from veloxbench.records.arm import REFERENCE
from veloxbench.records.record import Record, content_hash
from veloxbench.records.store import CONTRIBUTED
from veloxbench.records.suites import suite_row
from veloxbench.run.plan import other_code

PLACE = Path("records") / CONTRIBUTED
"""Where a pull request has them, from the checkout's root."""


def problems(records: Sequence[Record]) -> list[str]:
    """Every reason why records cannot be published; their form and hashes are checked when they are read."""
    if not any(record.status == "measured" for record in records):
        return ["there is no measured record"]
    return [*_each(records), *_noise_floors(records)]


def _each(records: Iterable[Record]) -> Iterable[str]:
    for record in records:
        name = f"{record.id[:12]} ({record.subject.suite} {subject_name(record)})"
        if record.provenance.dirty or record.provenance.project_dirty:
            yield f"{name} was measured in a checkout with uncommitted changes"
        why = other_code(record, any_checkout=True)
        if why is not None:
            yield f"{name} is of code that is not this: {why}"
        if record.status != "measured":
            continue
        idle = [layer.layer for layer in record.engagement if layer.claimed and not layer.engaged]
        if idle:
            yield f"{name}: its method claims layers that it does not hold ({', '.join(map(str, idle))})"
        if suite_row(record.subject.suite).needs_model and not record.engagement:
            yield f"{name} does not say what held each layer"
        yield from (f"{name}, {finding.metric}: {finding.reason}" for finding in inconsistent(record))


def _noise_floors(records: Iterable[Record]) -> Iterable[str]:
    """Quality without the fp16 reference of the same tokens and machine, or with one that differs from itself."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        of = record.subject
        if of.suite == "perplexity" and record.status == "measured":
            same = [of.model.model_dump(), of.protocol, of.text.model_dump(), of.settings, of.machine_class]
            groups.setdefault(content_hash(same), []).append(record)
    for group in groups.values():
        floors = [r.metrics.get("kld_floor_mean") for r in group if r.subject.method.name == REFERENCE.name]
        what = f"the quality records of {group[0].subject.model.name}, {group[0].subject.protocol}"
        if not floors or floors[0] is None:
            yield f"{what} have no fp16 reference with its noise floor beside them"
        elif not floors[0].value <= FLOOR_LIMIT:
            yield f"{what}: fp16 differs from itself by {floors[0].value:.3g} nats a token, above {FLOOR_LIMIT:g}"


def layout(records: Iterable[Record]) -> dict[Path, str]:
    """The files of a pull request: one of records for each machine, named by its chip and what tells it from others."""
    machines: dict[str, list[Record]] = {}
    for record in records:
        hardware = record.provenance.hardware
        slug = re.sub(r"[^a-z0-9]+", "-", str(hardware.get("chip", "unknown")).lower()).strip("-")
        machines.setdefault(f"{slug}-{content_hash(hardware)[:8]}", []).append(record)
    return {
        PLACE / f"{name}.jsonl": "".join(record.to_line() for record in sorted(group, key=lambda r: r.key))
        for name, group in machines.items()
    }
