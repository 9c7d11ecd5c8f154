"""Settings of TD-LoRA (DyDiT++, arXiv 2504.06803), and files of users' LoRAs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dyexport.arguments import shown
from dyexport.errors import UsageError

Variant = Literal["standard", "inverse", "symmetric"]
Biases = Literal["none", "all"]
MOST_RANK, MOST_EXPERTS, MOST_ALPHA = 4096, 64, 65_536
KEYS = "rank, experts, variant, alpha and bias"
PEFT_WEIGHTS = "adapter_model.safetensors"  # peft's name for them, always next to their configuration
PEFT_CONFIG = "adapter_config.json"


class LoraSpec(BaseModel):
    """Settings of TD-LoRA.

    A linear layer computes W x + alpha / rank * sum_i g_i(t) B_i A_i x. g is the softmax of a router on the timestep.
    With one expert there is no router, and TD-LoRA is a plain LoRA.

    variant  what each expert has: B, with a shared A (``standard``), A, with a shared B (``inverse``), or both
             (``symmetric``)
    bias     ``all`` also trains the backbone's biases, as in peft. They are under 0.1 % of the parameters, and can
             compensate for the mean of units that are cut. Not in the paper.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1, le=MOST_RANK)
    experts: int = Field(default=4, ge=1, le=MOST_EXPERTS)
    variant: Variant = "standard"
    alpha: float = Field(gt=0, le=MOST_ALPHA, allow_inf_nan=False)
    bias: Biases = "none"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def down_experts(self) -> int:
        """Number of A matrices."""
        return 1 if self.variant == "standard" else self.experts

    @property
    def up_experts(self) -> int:
        """Number of B matrices."""
        return 1 if self.variant == "inverse" else self.experts

    @property
    def width(self) -> int:
        """Inner channels of the low-rank path after experts are mixed."""
        return self.rank * (self.experts if self.variant == "symmetric" else 1)


def parse_lora(text: str | None) -> LoraSpec | None:
    """Parse text such as ``rank=16,experts=4,variant=inverse,alpha=32``; alpha defaults to the rank.

    Raises ``UsageError`` for anything else.
    """
    if text is None:
        return None
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in LoraSpec.model_fields or name in values:
            raise UsageError(f"--td-lora {text!r}: {part!r} is not one of {KEYS}, once each; write rank=16,experts=4")
        values[name] = value
    if "rank" not in values:
        raise UsageError(f"--td-lora {text!r} has no rank; write rank=16,experts=4")
    try:
        return LoraSpec.model_validate({"alpha": values["rank"] or 1, **values})
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        valid = {name: " or ".join(get_args(choice)) for name, choice in (("variant", Variant), ("bias", Biases))}
        valid["alpha"] = f"a number above 0, up to {MOST_ALPHA}"
        valid["rank"] = f"a whole number from 1 to {MOST_RANK}"
        valid["experts"] = f"a whole number from 1 to {MOST_EXPERTS}"
        message = f"{field} is {shown(values.get(field))!r}; use {valid[field]}"
        raise UsageError(f"--td-lora {text!r}: {message}") from error


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A user's LoRA and its scale."""

    file: Path
    scale: float = 1.0


def parse_lora_file(text: str) -> LoraFile:
    """Parse ``FILE`` or ``FILE@SCALE``. An existing file whose name ends in ``@`` and a number is a ``FILE``."""
    name, at, scale = text.rpartition("@")
    if not at or Path(text).exists():
        return LoraFile(file=Path(text))
    try:
        return LoraFile(file=Path(name), scale=float(scale))
    except ValueError as error:
        raise UsageError(
            f"--lora {text}: {scale!r} is not a number and there is no such file; write {name}@0.8"
        ) from error


def lora_sources(file: Path) -> list[Path]:
    """List all files that a LoRA is read from; peft keeps the configuration in a separate file."""
    config = file.with_name(PEFT_CONFIG)
    return [file, config] if file.name == PEFT_WEIGHTS and config.is_file() else [file]
