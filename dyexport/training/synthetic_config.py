"""Settings for sampling training data from the static model. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dyexport.backbones.base import Preset
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.errors import UsageError

MOST_SAMPLES = 10**7
MOST_STEPS = 1000
STEPS, FLUX_STEPS, DISTILLED_STEPS = 50, 28, 4  # as diffusers' pipelines sample by default, and schnell
LABEL_GUIDANCE = 1.5
KEYS = "samples, steps and guidance"


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """``steps`` and ``guidance`` default to what is usual for a model.

    ``guidance`` is the scale of classifier-free guidance where a model has classes (1 turns it off), and what
    a guidance-distilled model is called with.
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
        """The same with a model's defaults; raises ``UsageError`` for guidance of a model that takes none."""
        usual = _usual_guidance(preset)
        if self.guidance is not None and usual is None:
            raise UsageError(
                f"guidance of synthetic data is {self.guidance:g}, and {preset.name} is sampled without; leave it out"
            )
        steps = _usual_steps(preset) if self.steps is None else self.steps
        return replace(self, steps=steps, guidance=usual if self.guidance is None else self.guidance)


def _usual_steps(preset: Preset) -> int:
    if not isinstance(preset, FluxPreset):
        return STEPS
    return DISTILLED_STEPS if preset.guidance is None else FLUX_STEPS


def _usual_guidance(preset: Preset) -> float | None:
    if isinstance(preset, FluxPreset):
        return preset.guidance
    return LABEL_GUIDANCE if preset.classes else None


def parse_synthetic(text: str | None) -> SyntheticConfig | None:
    """``samples=1024,steps=28,guidance=3.5``, any of them; raises ``UsageError`` for anything else."""
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
