"""Sample and timestep counts of calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dyexport.backbones.base import Preset


@dataclass(frozen=True, kw_only=True)
class CalibrationEffort:
    """Counts of timesteps and of samples at each; ``probes`` are backward passes for each sample."""

    samples: int
    importance: int
    probes: int
    compared: int  # with the static model
    tokens: int
    token_draws: int
    ranges: int  # values of t in each segment


DIGITS = CalibrationEffort(samples=16, importance=32, probes=4, compared=16, tokens=32, token_draws=2, ranges=8)
USUAL = replace(DIGITS, samples=2)
HEAVY = 1e12  # parameters x tokens, from which on one sample takes minutes on a CPU
SPARSE = CalibrationEffort(samples=1, importance=8, probes=1, compared=4, tokens=8, token_draws=1, ranges=2)


def effort_for(preset: Preset) -> CalibrationEffort:
    if preset.pixel_space:
        return DIGITS
    return SPARSE if preset.parameters * preset.tokens >= HEAVY else USUAL
