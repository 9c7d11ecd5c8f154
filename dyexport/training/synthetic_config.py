"""Settings for sampling training data from the static model. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dyexport.backbones.base import Preset
from dyexport.errors import UsageError

MOST_SAMPLES = 10**7
MOST_STEPS = 1000
KEYS = "samples, steps and guidance"


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Settings for sampling synthetic data.

    samples   number of samples
    steps     denoising steps; None: the model's default
    guidance  scale of classifier-free guidance (1 turns it off), or the scale that a guidance-distilled model takes
              as an input; None: the model's default
    """

    samples: int = 4096
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("samples", MOST_SAMPLES), ("steps", MOST_STEPS)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"{name} of synthetic data is {value}; give 1 to {most}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UsageError(f"guidance of synthetic data is {self.guidance}; give a number of 0 or more, such as 1.5")

    def resolved(self, preset: Preset) -> SyntheticConfig:
        """Return settings with a model's defaults. Raises ``UsageError`` for guidance of a model that takes none."""
        default = preset.sampling
        if self.guidance is not None and default.guidance is None:
            raise UsageError(
                f"guidance of synthetic data is {self.guidance:g}, and {preset.name} is sampled without; leave it out"
            )
        steps = default.steps if self.steps is None else self.steps
        return replace(self, steps=steps, guidance=default.guidance if self.guidance is None else self.guidance)


def parse_synthetic(text: str | None) -> SyntheticConfig | None:
    """Parse text such as ``samples=1024,steps=28,guidance=3.5``, any of them. Raises ``UsageError``."""
    if text is None:
        return None
    kinds = {"samples": int, "steps": int, "guidance": float}
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in kinds or name in values:
            raise UsageError(f"--synthetic {text!r}: {part!r} is not one of {KEYS}, once each; write samples=1024")
        try:
            values[name] = kinds[name](value)
        except ValueError as error:
            raise UsageError(f"--synthetic {text!r}: {name} is {value!r}; give a number") from error
    return SyntheticConfig(**values)
