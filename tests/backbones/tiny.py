"""Random inputs of every backbone's tiny model."""

from __future__ import annotations

from dyexport.backbones.base import Inputs
from dyexport.models.inputs import NoisedInputs
from tests.factories import tiny_preset

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
EARLY, MIDDLE, LATE = 0.2, 0.5, 0.8  # shares of the range of t


def noised(backbone: str, share: float = MIDDLE, batch_size: int = 2) -> Inputs:
    """Random inputs of the stock module."""
    return NoisedInputs(preset=tiny_preset(backbone), batch_size=batch_size).at(t_at(backbone, share))


def t_at(backbone: str, share: float) -> float:
    start, end = tiny_preset(backbone).timestep_range
    return start + share * (end - start)
