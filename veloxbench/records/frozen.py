"""The base of everything that is written down: immutable, and without fields that nobody declared."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Values that are compared and hashed by what they hold; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
