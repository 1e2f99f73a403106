"""Baselines: what a gate compares with, kept as raw samples in ``baselines/<fingerprint>/<suite>.json``.

A fingerprint holds what must be equal for a comparison to mean anything, and no more, so that a new commit
finds its baseline. The implementation under test is never in it. By tier:

- ``exact`` (bytes, codes, allocations): weights, tokenizer, text, protocol; for codes the kind of device. Holds on
  every machine.
- ``quality``: the same, and the chip family, the device and MLX's minor version. Where the order of fp32 sums
  (:func:`veloxbench.measure.machine.rounding`) is another one, the quantization noise is drawn anew: the baseline
  holds all the same, its own rounding's first, and the paired test counts that noise.

Stored timings gate nothing: another day of the same machine differs by more than a regression does.
A file is written whole by :func:`approve` alone, and carries the hash of its content.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, JsonValue, ValidationError, model_validator

from veloxbench.errors import BaselineError, IntegrityError, validation_reason
from veloxbench.records.arm import REFERENCE, from_earlier_label
from veloxbench.records.frozen import Frozen
from veloxbench.records.journal import read_content
from veloxbench.records.record import Finite, Record, content_hash
from veloxbench.records.selection import canonical, of_newest_code
from veloxbench.records.suites import suite_row

StoredTier = Literal["exact", "quality"]
SCHEMA_VERSION = 2

QUALITY_LIFE = timedelta(days=365)
"""Quality is measured anew at least this often; bytes and codes do not age."""


class Snapshot(Frozen):
    """The gated part of one record."""

    record_id: str
    measured: datetime
    commit: str | None
    status: Literal["measured", "unsupported"]
    metrics: dict[str, Finite] = Field(default_factory=dict)
    samples: dict[str, list[Finite]] = Field(default_factory=dict)


class Entry(Frozen):
    """One subject's baseline: as last approved, and as at the last release, from which drift is counted."""

    subject: str
    approved: Snapshot
    released: Snapshot | None = Field(description="absent: the same as approved")
    approval: int = Field(description="index of the approval that set it")

    @property
    def at_release(self) -> Snapshot:
        """The value from which drift is counted."""
        return self.released or self.approved


class Approval(Frozen):
    """Who changed the baseline, when and why."""

    who: str
    when: datetime
    why: str
    commit: str | None
    release: str | None = None


class BaselineFile(Frozen):
    """One ``<fingerprint>/<suite>.json``."""

    schema_version: Literal[1, 2] = 2
    tier: StoredTier
    suite: str
    fingerprint: dict[str, JsonValue]
    profiles: tuple[str, ...]
    """A run of one of these profiles must produce every entry."""
    expires: date | None
    """The earliest last day of its entries (:meth:`expired`); None: they do not age."""
    approvals: tuple[Approval, ...]
    entries: tuple[Entry, ...]
    content_sha256: str

    @model_validator(mode="after")
    def _hash_matches(self) -> BaselineFile:
        if self.content_sha256 != self.content_id():
            raise ValueError("its content hash does not match: it was edited by hand")
        if not self.entries:
            raise ValueError("it has no entries")
        return self

    def content_id(self) -> str:
        """sha256 of the canonical JSON without the hash itself."""
        return content_hash(self.model_dump(mode="json", exclude={"content_sha256"}))

    @classmethod
    def create(cls, **fields: object) -> BaselineFile:
        """A validated file with its hash computed."""
        draft = cls.model_construct(content_sha256="", **fields)  # type: ignore[arg-type]
        return cls.model_validate({**draft.model_dump(mode="json"), "content_sha256": draft.content_id()})

    @functools.cached_property
    def place(self) -> str:
        """``<fingerprint>/<suite>.json``."""
        return f"{fingerprint_id(self.fingerprint)}/{self.suite}.json"

    @property
    def by_subject(self) -> dict[str, Entry]:
        """Entries by the name of what was measured."""
        return {entry.subject: entry for entry in self.entries}

    def expired(self, day: date) -> dict[str, date]:
        """Entries that are too old on a day, with their last day: each counts from its own measurement."""
        if self.expires is None:
            return {}
        last = {entry.subject: _last_day(entry) for entry in self.entries}
        return {subject: of_entry for subject, of_entry in last.items() if of_entry < day}

    @property
    def machine(self) -> dict[str, JsonValue]:
        """The part of the fingerprint that says where it holds; empty: everywhere."""
        return {name: self.fingerprint[name] for name in MACHINE_FIELDS if name in self.fingerprint}

    def holds_on(self, machine: Mapping[str, JsonValue]) -> bool:
        """Whether a machine (its :func:`machine_fields`) is one of those."""
        return all(machine.get(name) == value for name, value in self.machine.items())

    def to_text(self) -> str:
        """The file's text, a list of samples on one line so that a diff can be read."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True)
        return re.sub(r"\[[-+\d.eE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def _last_day(entry: Entry) -> date:
    return entry.approved.measured.date() + QUALITY_LIFE


MACHINE_FIELDS = ("chip_family", "device", "mlx")
"""The fields of a machine that must be equal for a quality baseline to hold there."""

REDRAWN = "rounding"
"""The field of a fingerprint by which a baseline may differ from what it is compared with."""


def chip_family(hardware: Mapping[str, JsonValue]) -> str:
    """``x86-64``, ``apple-silicon`` or ``arm64``."""
    machine = str(hardware.get("machine", "")).lower()
    if machine in ("x86_64", "amd64"):
        return "x86-64"
    if machine in ("arm64", "aarch64"):
        return "apple-silicon" if "apple" in str(hardware.get("chip", "")).lower() else "arm64"
    return machine or "unknown"


def machine_fields(hardware: Mapping[str, JsonValue], versions: Mapping[str, str]) -> dict[str, JsonValue]:
    """Chip family, device, MLX's minor version and the order of fp32 sums of a machine."""
    return {
        "chip_family": chip_family(hardware),
        "device": hardware.get("device"),
        "mlx": ".".join(versions.get("mlx", "unknown").split(".")[:2]),
        "rounding": hardware.get("rounding"),
    }


def fingerprint(record: Record, tier: StoredTier) -> dict[str, JsonValue]:
    """What must be equal for a comparison in this tier; the implementation under test is not in it."""
    subject = record.subject
    fields: dict[str, JsonValue] = {
        "tier": tier,
        "suite": subject.suite,
        "protocol": subject.protocol,
        "model": subject.model.name,
        "weights_sha256": subject.model.weights_sha256,
        "tokenizer_sha256": subject.model.tokenizer_sha256,
        "config_sha256": subject.model.config_sha256,
        "n_layers": subject.model.n_layers,
        "tokens_sha256": subject.text.tokens_sha256,
        "settings": subject.settings,
    }
    if tier == "quality":
        return {**fields, **machine_fields(record.provenance.hardware, record.provenance.versions)}
    # codes on fixed inputs are those of one kind of device: a GPU may divide to another last bit
    device = record.provenance.hardware.get("device")
    return {**fields, "device": device} if suite_row(subject.suite).device_bound else fields


def fingerprint_id(fields: Mapping[str, JsonValue]) -> str:
    """The folder's name."""
    return content_hash(dict(fields))[:16]


def travel_id(fields: Mapping[str, JsonValue]) -> str:
    """What a baseline shares with everything that may be compared with it: its fingerprint but for the rounding."""
    return canonical({name: value for name, value in fields.items() if name != REDRAWN})


def subject_name(record: Record) -> str:
    """``smollm2-135m chunked turboquant_mse@4``: the same before and after a change of code."""
    return f"{record.subject.model.name} {record.subject.protocol} {record.subject.method.label}"


def gated_metrics(record: Record, tier: StoredTier) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the metrics and of the samples that a tier gates in records of this suite.

    Raises:
        UsageError: a suite that is not known here.
    """
    row = suite_row(record.subject.suite)
    if tier == "exact":
        return (tuple(record.metrics), tuple(record.samples)) if row.exact is None else (row.exact, ())
    is_reference = record.subject.method.name == REFERENCE.name
    return (), tuple(row.per_sequence_of_reference if is_reference else row.per_sequence)


def snapshot(record: Record, tier: StoredTier) -> Snapshot | None:
    """The part of a record that a tier gates; None where it gates nothing of it."""
    metrics, samples = gated_metrics(record, tier)
    if not metrics and not samples:
        return None
    return Snapshot.model_construct(  # of a record that was validated
        record_id=record.id,
        measured=record.provenance.started,
        commit=record.provenance.commit,
        status=record.status,
        metrics={name: record.metrics[name].value for name in metrics if name in record.metrics},
        samples={name: record.samples[name] for name in samples if name in record.samples},
    )


@dataclass(frozen=True)
class Group:
    """Snapshots that share a fingerprint: what one baseline file is compared with."""

    tier: StoredTier
    suite: str
    fingerprint: Mapping[str, JsonValue]
    snapshots: dict[str, Snapshot] = field(default_factory=dict)

    @functools.cached_property
    def id(self) -> str:
        """The fingerprint's hash."""
        return fingerprint_id(self.fingerprint)

    @property
    def described(self) -> str:
        """Suite, model and protocol in words."""
        return f"{self.suite} of {self.fingerprint['model']}, {self.fingerprint['protocol']}"


def grouped(records: Iterable[Record]) -> list[Group]:
    """The gated parts of the newest code's records, by tier and fingerprint."""
    groups: dict[str, Group] = {}
    for record in of_newest_code(records):
        for tier in ("exact", "quality"):
            part = snapshot(record, tier)
            if part is None:
                continue
            fields = fingerprint(record, tier)
            group = groups.setdefault(fingerprint_id(fields), Group(tier, record.subject.suite, fields))
            group.snapshots[subject_name(record)] = part
    return list(groups.values())


@dataclass(frozen=True)
class Baselines:
    """The baselines of a folder, or those that another run's records make."""

    files: tuple[BaselineFile, ...]
    origin: str
    tiers: tuple[StoredTier, ...] = get_args(StoredTier)
    """The tiers that are judged by them."""

    def of_tiers(self, tiers: Sequence[str]) -> Baselines:
        """The baselines of some tiers, so that only these are judged."""
        chosen = tuple(tier for tier in self.tiers if tier in tiers)
        return Baselines(tuple(file for file in self.files if file.tier in chosen), self.origin, chosen)

    def own(self, group: Group) -> BaselineFile | None:
        """The file of exactly this fingerprint: the one that an approval rewrites."""
        return self._by_fingerprint.get(group.id)

    def find(self, group: Group) -> BaselineFile | None:
        """The file that a group is compared with: its own, or else one of another rounding."""
        return self.own(group) or self._by_travel.get(travel_id(group.fingerprint))

    @functools.cached_property
    def _by_fingerprint(self) -> dict[str, BaselineFile]:
        return {fingerprint_id(file.fingerprint): file for file in reversed(self.files)}

    @functools.cached_property
    def _by_travel(self) -> dict[str, BaselineFile]:
        return {travel_id(file.fingerprint): file for file in reversed(self.files)}

    def of_profile(self, profile: str | None) -> tuple[BaselineFile, ...]:
        """Files whose entries a run of this profile must produce; all of them for None."""
        return tuple(file for file in self.files if profile is None or profile in file.profiles)


def read_baselines(folder: Path) -> Baselines:
    """Every baseline below a folder, verified.

    Raises:
        BaselineError: no folder, an empty one, a file that is not valid or was edited by hand, or one that
            lies under another fingerprint; names it.
    """
    if not folder.is_dir():
        raise BaselineError(f"there is no baseline folder {folder}; `veloxbench baseline approve` makes one")
    paths = sorted(folder.glob("*/*.json"), key=lambda path: path.parts)
    if not paths:
        raise BaselineError(f"the baseline folder {folder} is empty; `veloxbench baseline approve` fills it")
    return Baselines(tuple(_read_file(path) for path in paths), str(folder))


def _read_file(path: Path) -> BaselineFile:
    try:
        file = BaselineFile.model_validate_json(read_content(path))
    except (ValidationError, IntegrityError, RecursionError) as error:
        reason = validation_reason(error) if isinstance(error, ValidationError) else str(error)
        raise BaselineError(f"{path} cannot be used as a baseline: {reason}") from error
    if f"{path.parent.name}/{path.name}" != file.place:
        raise BaselineError(f"{path} is the baseline {file.place}; it was moved by hand")
    late = [entry for entry in file.entries if entry.approved.measured > datetime.now(UTC) + timedelta(days=1)]
    if late:
        raise BaselineError(
            f"{path}: {late[0].subject} says that it was measured on {late[0].approved.measured:%Y-%m-%d}: the "
            "clock was wrong then, or is now; measure and approve it again"
        )
    return file if file.schema_version == SCHEMA_VERSION else _respelled(file)


def _respelled(file: BaselineFile) -> BaselineFile:
    """A file of the first version, whose subjects were written in the earlier form, ``turboquant_mse 4 (sinks=4)``."""
    prefix = f"{file.fingerprint['model']} {file.fingerprint['protocol']} "
    entries = [
        entry.model_copy(update={"subject": prefix + from_earlier_label(entry.subject.removeprefix(prefix)).label})
        for entry in file.entries
    ]
    fields = {name: getattr(file, name) for name in BaselineFile.model_fields if name != "content_sha256"}
    return BaselineFile.create(**{**fields, "schema_version": SCHEMA_VERSION, "entries": tuple(entries)})


def from_records(records: Iterable[Record], origin: str, profile: str = "compared") -> Baselines:
    """Baselines that live in memory: the base of a comparison of two runs."""
    now = datetime.now(UTC)
    approval = Approval(who="", when=now, why=f"base of a comparison: {origin}", commit=None)
    files = [
        merged(None, group, approval, profile=profile, release=None, drop_missing=False, ages=False)
        for group in grouped(records)
    ]
    return Baselines(tuple(files), origin)


def merged(
    old: BaselineFile | None,
    group: Group,
    approval: Approval,
    *,
    profile: str,
    release: str | None,
    drop_missing: bool,
    ages: bool = True,
) -> BaselineFile:
    """The file ``old`` with a group's snapshots taken in; entries that did not move keep their approval."""
    known = {} if old is None else old.by_subject
    approvals = (*(() if old is None else old.approvals), approval)
    entries = {} if drop_missing else dict(known)
    for name, part in group.snapshots.items():
        before = known.get(name)
        released = None if before is None or release is not None else before.at_release
        if released == part:
            released = None
        if before is not None and (before.approved, before.released) == (part, released):
            entries[name] = before
        else:
            entries[name] = Entry(subject=name, approved=part, released=released, approval=len(approvals) - 1)
    profiles = dict.fromkeys([*(() if old is None else old.profiles), profile])
    return BaselineFile.create(
        tier=group.tier,
        suite=group.suite,
        fingerprint=dict(group.fingerprint),
        profiles=tuple(profiles),
        expires=min(map(_last_day, entries.values())) if ages and group.tier == "quality" else None,
        approvals=approvals,
        entries=tuple(entries[name] for name in sorted(entries)),
    )
