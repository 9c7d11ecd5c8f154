"""The sampling steps of a trajectory: the value of t at each, and the engine that serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dyexport.backbones import get_pipeline
from dyexport.bundle.plan import SegmentPlan
from dyexport.bundle.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step: its number from 0, its value of t, and the index of its engine."""

    index: int
    t: float
    segment: int


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Denoising steps in the order of sampling; ``scheduler`` is the diffusers class that chose them."""

    steps: tuple[Step, ...]
    scheduler: str

    @property
    def switches(self) -> int:
        """Number of steps that another engine serves than the step before."""
        return sum(a.segment != b.segment for a, b in zip(self.steps, self.steps[1:], strict=False))


def trajectory_of(spec: ModelSpec, plan: SegmentPlan, steps: int, scheduler: str | None = None) -> Trajectory:
    """Return the steps of a model's scheduler, by default that of its pipeline."""
    chosen = get_pipeline(spec.backbone).scheduler(spec, scheduler)
    timesteps = enumerate(timesteps_of(spec, chosen, steps))
    return Trajectory(
        steps=tuple(Step(index=index, t=t, segment=plan.segment_for(t)) for index, t in timesteps),
        scheduler=type(chosen).__name__,
    )


def timesteps_of(spec: ModelSpec, scheduler: Any, steps: int) -> list[float]:
    """Set the timesteps of a scheduler, and return what the network is called with.

    The sigmas of ``flow-sigma`` go from 1 to 1 / steps, and may be shifted by a line in the number of tokens, as in
    diffusers' pipelines.
    """
    if spec.objective == "ddpm":
        scheduler.set_timesteps(steps)
        return [float(t) for t in scheduler.timesteps]
    if spec.objective == "flow":
        scheduler.set_timesteps(steps)
        return [min(max(1.0 - float(sigma), 0.0), spec.timestep_range[1]) for sigma in scheduler.sigmas[:steps]]
    sigmas = np.linspace(1, 1 / steps, steps)
    shift = {"mu": _shift(scheduler.config, spec.tokens)} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(sigmas=sigmas, **shift)
    return [min(float(sigma), spec.timestep_range[1]) for sigma in scheduler.sigmas[:steps]]


def _shift(config: Any, tokens: int) -> float:
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (tokens - config.base_image_seq_len))
