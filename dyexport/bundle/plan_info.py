"""Description of a TensorRT plan that can be read without a GPU: how it was built, for what, from which graph."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dyexport.bundle.tensors import TensorSpec
from dyexport.errors import EngineMismatchError, UsageError

Flavour = Literal["tensorrt", "tensorrt-rtx", "torch-tensorrt"]

ENGINE = "engine.plan"
PROGRAM = "program.pt2"  # instead, of Torch-TensorRT
INFO = "plan.json"

LARGEST_TOPK = 3840  # rows, the most that TensorRT sorts
SMALLEST_SIDE = 4  # tokens along an edge of the smallest picture of a plan: golden inputs are small
OLDEST_FP32 = 8.0  # compute capability of the first GPUs that TensorRT-RTX multiplies in fp32 on: Ampere
OLDEST_FP8 = 8.9  # compute capability of the first GPUs that multiply in FP8: Ada


class Profile(BaseModel):
    """The smallest, the most frequent and the largest size of a dimension that is free at run time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int
    opt: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{self.min}:{self.opt}:{self.max} must rise, from 1 or more")
        return self

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Parse ``1:2:8``, or ``4`` for all three. Raises ``UsageError``."""
        parts = text.split(":")
        try:
            low, best, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
            return cls(min=low, opt=best, max=high)
        except ValueError as error:
            raise UsageError(f"{text!r} is not MIN:OPT:MAX, three rising numbers from 1 on, such as 1:2:8") from error

    @classmethod
    def up_to(cls, size: int, *, least: int = 1) -> Profile:
        """Make the profile of sizes from ``least`` to ``size``, which is the most frequent one."""
        return cls(min=max(least, 1), opt=size, max=size)

    def times(self, factor: int) -> Profile:
        return Profile(min=factor * self.min, opt=factor * self.opt, max=factor * self.max)


def smallest_side(side: int) -> int:
    """Return the fewest tokens along an edge of a picture that a plan takes, where the model's size is ``side``."""
    return min(side // 2, SMALLEST_SIDE)


class PlanInfo(BaseModel):
    """Contents of ``plan.json``, next to a plan. ``profiles`` are by symbol; ``precision`` is the graph's.

    ``compute_capabilities`` are the GPUs that the plan runs on (``8.6``); none means all that its builder supports.
    ``streamable`` plans can stream the weights that do not fit on the device from host memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flavour: Flavour
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    streamable: bool = False
    profiles: tuple[dict[str, Profile], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[str, ...]
    graph_sha256: str
    plan_sha256: str

    @classmethod
    def read(cls, path: Path) -> PlanInfo:
        """Read a description. Raises ``EngineMismatchError`` for a file that is not one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise EngineMismatchError(f"cannot read {path}: {error}; make it again with `dyexport compile`") from error
