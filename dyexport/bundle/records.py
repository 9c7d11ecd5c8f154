"""Base of the records that a bundle stores as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

REPLACE = "copy the bundle again, or build it again"  # cure of a damaged file


class Frozen(BaseModel):
    """Base of records: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def first_problem(error: ValidationError) -> str:
    """Return the path and the message of the first validation error."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
