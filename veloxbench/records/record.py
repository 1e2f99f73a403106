"""Measurement records: immutable, validated on write and on read, identified by their content.

A :class:`Subject` says everything that may move a number: what was measured, on what, how, with which
code, on which class of machine. Its hash is the record's ``key``; a run that finds the key in the store
does not measure again. The record's ``id`` is the hash of the whole record.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationInfo, model_validator

from veloxbench.records.arm import Arm
from veloxbench.records.frozen import Frozen

SCHEMA_VERSION: Literal[1] = 1


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Estimate(Frozen):
    """A figure with its 95% interval; ``interval`` names the method and the sample size."""

    value: Finite
    unit: str
    low: Finite | None = None
    high: Finite | None = None
    interval: str | None = None


class ModelRef(Frozen):
    """The weights and tokenizer, by hash. ``n_layers`` is set when the model was cut to its first layers."""

    name: str
    weights_sha256: str
    tokenizer_sha256: str
    config_sha256: str
    n_layers: int | None = None


NO_MODEL = ModelRef(name="no model", weights_sha256="", tokenizer_sha256="", config_sha256="")
"""The model of measurements that read none."""


class MethodRef(Arm):
    """An arm as it stands in a record's key. ``target`` is what ``target_means`` says."""

    target_means: Literal["code_bits", "bits_per_value"] | None = None
    implementation: str = Field(description="version of the package, or hash of the source, that implements it")


class TextRef(Frozen):
    """The tokens that were read, by hash of the token array."""

    name: str
    tokens_sha256: str


class Subject(Frozen):
    """Everything that identifies a measurement; its hash is the key by which a run resumes."""

    suite: str = Field(min_length=1, description="its name, as in `veloxbench.records.suites`")
    protocol: str
    model: ModelRef
    method: MethodRef
    text: TextRef
    settings: dict[str, JsonValue]
    harness: str = Field(description="hash of the measuring code")
    machine_class: str = Field(description="hash of the part of the environment that moves this suite's numbers")

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON."""
        return content_hash(self.model_dump(mode="json"))


class LayerEngagement(Frozen):
    """What held one layer's keys and values."""

    layer: int
    cache_class: str
    claimed: bool = Field(description="the method says that it quantizes this layer")
    engaged: bool = Field(description="the layer really holds the method's storage")
    key_bits: float | None = Field(default=None, description="code width of keys; the mean where KV heads differ")
    value_bits: float | None = Field(default=None, description="code width of values; the mean where KV heads differ")
    stored_dtypes: list[str]
    tokens: int
    n_values: int = Field(description="cached K and V values of the stored tokens")
    used_bytes: Finite
    allocated_bytes: int
    attention: str | None = Field(default=None, description="how attention read the layer: fused or plain, and why")


class Provenance(Frozen):
    """Where, when and with what the measurement was made."""

    started: datetime
    seconds: Finite
    commit: str | None
    dirty: bool | None
    project_commit: str | None = Field(
        default=None, description="of the working directory's checkout, where that is not the measuring code's own"
    )
    project_dirty: bool | None = None
    versions: dict[str, str]
    hardware: dict[str, JsonValue]
    state: dict[str, JsonValue]
    model_licence: str | None = Field(default=None, description="of the weights, where it is known")
    text_licence: str | None = Field(default=None, description="of the text, where it is known")


SUBJECT = b'"subject":{"harness":"'
"""How the subject begins in a record's line."""
LATER_PROVENANCE = ("model_licence", "text_licence", "project_commit", "project_dirty")


class Record(Frozen):
    """One measurement. ``status`` is ``unsupported`` where the implementation refused the configuration."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    key: str
    subject: Subject
    status: Literal["measured", "unsupported"]
    reason: str | None = None
    metrics: dict[str, Estimate]
    samples: dict[str, list[Finite]] = Field(description="raw samples: one per sequence, pair or phase")
    engagement: list[LayerEngagement]
    provenance: Provenance

    @model_validator(mode="after")
    def _hashes_match(self, info: ValidationInfo) -> Record:
        if info.context != (self.key, self.id):
            content = self._content()
            if self.key != content_hash(content["subject"]):
                raise ValueError(f"key {self.key[:12]} is not the hash of the record's subject")
            if self.id != content_hash(content):
                raise ValueError(f"id {self.id[:12]} is not the hash of the record's content")
        if self.status == "measured" and not self.metrics:
            raise ValueError("a measured record needs metrics")
        if self.status == "unsupported" and not self.reason:
            raise ValueError("an unsupported record needs its reason")
        return self

    def content_id(self) -> str:
        """sha256 of the canonical JSON without ``id``; later fields count only where they are known."""
        return content_hash(self._content())

    def _content(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude={"id"})
        later = [(layer, "attention") for layer in content["engagement"]]
        later += [(content["provenance"], name) for name in LATER_PROVENANCE]
        for fields, name in later:
            if fields[name] is None:  # records from before the field existed keep their id
                del fields[name]
        return content

    @classmethod
    def create(cls, **fields: Any) -> Record:
        """A validated record with its key and id computed."""
        subject = fields["subject"]
        draft = cls.model_construct(id="", key=subject.key, **{"reason": None, **fields})
        return cls.model_validate({**draft.model_dump(mode="json"), "id": draft.content_id()})

    def to_line(self) -> str:
        """The record as one JSON line."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str | bytes) -> Record:
        """Parse and validate; raises ``pydantic.ValidationError`` for anything that is not a whole record.

        A line that :meth:`to_line` wrote is canonical JSON, whose hashes are those of its own bytes: where they are
        its key and its id, it need not be written anew to be hashed.
        """
        line = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
        return cls.model_validate_json(line, context=_hashes(line.rstrip()))


_ID = re.compile(rb'"id":"[0-9a-f]{64}",')
_NOT_KNOWN = tuple(f'"{name}":null,'.encode() for name in ("attention", *LATER_PROVENANCE))


def _hashes(line: bytes) -> tuple[str, str]:
    """Key and id of a line if it is as :meth:`Record.to_line` writes it, its subject last."""
    content = _ID.sub(b"", line, count=1)
    for field in _NOT_KNOWN:
        content = content.replace(field, b"")
    subject = line[line.find(SUBJECT) + len(b'"subject":') : -1]
    return hashlib.sha256(subject).hexdigest(), hashlib.sha256(content).hexdigest()


class FailedMeasurement(Frozen):
    """A measurement that crashed and so has no record: what it was of, when, and why in one line."""

    subject: Subject
    when: datetime
    reason: str


def content_hash(value: Any) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces, shortest float form)."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_schema() -> str:
    """The published JSON Schema of a record line."""
    schema = Record.model_json_schema(mode="serialization")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
