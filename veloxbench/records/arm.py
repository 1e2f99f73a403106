"""An arm: a method at one target with its parameters, and the one way in which it is written."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import AliasChoices, Field, JsonValue

from veloxbench.errors import UsageError
from veloxbench.records.frozen import Frozen

_EARLIER = re.compile(r"(?P<name>[^\s@:(]+)(?: (?P<target>[\d.]+))?(?: \((?P<parameters>[^()]*=[^()]*)\))?")
"""How an arm was written in tables and baselines before: ``mlx-affine 4 (group_size=32)``."""


class Arm(Frozen):
    """A method at one target with its parameters: one row of a table.

    It is written ``turboquant_mse@4:sinks=4`` wherever it is written: in grids and on the command line, in tables and
    baselines, in the names of pytest's items. Without a target it is a bare name, ``fp16``.

    Attributes:
        name: the method's.
        target: a code width or bits_per_value, as the method understands it.
        parameters: those that are not the method's defaults.
    """

    name: str = Field(validation_alias=AliasChoices("name", "method"))
    target: float | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """The arm as it is written; :meth:`parse` reads it."""
        target = "" if self.target is None else f"@{self.target:g}"
        parameters = (f":{key}={_written(value)}" for key, value in sorted(self.parameters.items()))
        return "".join([self.name, target, *parameters])

    def __str__(self) -> str:
        return self.label

    @property
    def alone(self) -> Arm:
        """The arm without what a subclass adds to it."""
        return Arm(name=self.name, target=self.target, parameters=self.parameters)

    @property
    def at_any_target(self) -> Arm:
        """The same method and parameters without a target: a series of arms."""
        return Arm(name=self.name, parameters=self.parameters)

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``name@target:key=value:key=value``; target and parameters may be absent.

        Raises:
            UsageError: another form; the earlier one is named with how it is written now.
        """
        text = text.strip()
        head, *pairs = text.split(":")
        name, at, target = head.partition("@")
        earlier = _EARLIER.fullmatch(text) if " " in text or "(" in text else None
        if earlier is not None:
            raise UsageError(f"{text!r} is written {from_earlier_label(text).label!r}")
        parameters: dict[str, JsonValue] = {}
        for pair in pairs:
            key, separator, value = pair.partition("=")
            if not separator or not key.strip():
                raise UsageError(f"{text!r}: {pair!r} is no parameter; write {head}:key=value")
            if key.strip() in parameters:
                raise UsageError(f"{text!r} gives {key.strip()} twice")
            parameters[key.strip()] = _read(value.strip())
        if not name.strip() or (at and _number(target) is None):
            raise UsageError(f"{text!r} is no arm; write NAME@TARGET:key=value, as in turboquant_mse@4:sinks=4")
        return cls(name=name.strip(), target=_number(target) if at else None, parameters=parameters)


REFERENCE = Arm(name="fp16")
"""What every other arm is compared with: the model's own cache in fp16."""


def from_earlier_label(text: str) -> Arm:
    """The arm of a label in the earlier form, ``mlx-affine 4 (group_size=32)``, as stored baselines may have it.

    Raises:
        UsageError: not of that form.
    """
    match = _EARLIER.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no arm in the earlier form, as in 'mlx-affine 4 (group_size=32)'")
    pairs = re.split(r", (?=[^,=]+=)", match["parameters"]) if match["parameters"] else []
    parameters = {key: _read(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    return Arm(name=match["name"], target=_number(match["target"] or ""), parameters=parameters)


def _written(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _read(text: str) -> Any:
    """A whole number, a number, a truth value, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "True": True, "false": False, "False": False}.get(text, text)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number == number and abs(number) != float("inf") else None
