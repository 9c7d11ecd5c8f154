"""Numbers of samples and timesteps that calibration evaluates, read by ``pipeline/calibrate.py``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

CALIBRATION_SAMPLES = 512  # latents of the data that batches are taken from; without data they are noise
TRAJECTORY_POINTS = 512  # timesteps that the FLOPs ratio averages over; more than a width table has rows


@dataclass(frozen=True, kw_only=True)
class CalibrationEffort:
    """Numbers of timesteps and of samples at each that calibration evaluates.

    ``samples`` are used at each timestep; ``importance``, ``compared`` and ``tokens`` are numbers of timesteps that
    rank units, compare with the static model, and count tokens. ``probes`` are backward passes for each sample,
    ``token_draws`` batches at each timestep, and ``ranges`` timesteps in each segment for quantization. ``repair`` is
    the number of tokens, for each input of the widest layer, that projections are fitted to where nothing is trained;
    0: they are not, since that takes hours on a CPU for the largest models.
    """

    samples: int
    importance: int
    probes: int
    compared: int
    tokens: int
    token_draws: int
    ranges: int
    repair: int


THOROUGH = CalibrationEffort(
    samples=16, importance=32, probes=4, compared=16, tokens=32, token_draws=2, ranges=8, repair=4
)
DEFAULT_EFFORT = replace(THOROUGH, samples=2)
SPARSE = CalibrationEffort(samples=1, importance=8, probes=1, compared=4, tokens=8, token_draws=1, ranges=2, repair=0)
