"""How much of a model calibration runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dyexport.build.settings import BuildSettings


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Counts of timesteps and of samples at each; ``probes`` are backward passes for each sample."""

    samples: int
    importance: int
    probes: int
    compared: int  # with the static model
    tokens: int
    token_draws: int
    ranges: int  # values of t in each segment


DIGITS = Passes(samples=16, importance=32, probes=4, compared=16, tokens=32, token_draws=2, ranges=8)
USUAL = replace(DIGITS, samples=2)
HEAVY = 1e12  # parameters x tokens, from which on one sample takes minutes on a CPU
FEW = Passes(samples=1, importance=8, probes=1, compared=4, tokens=8, token_draws=1, ranges=2)


def passes_for(settings: BuildSettings) -> Passes:
    preset = settings.preset
    if preset.pixel_space:
        return DIGITS
    return FEW if preset.parameters * preset.tokens >= HEAVY else USUAL
