"""Noise schedules that models are trained with, and the diffusers schedulers that sample them. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from dyexport.errors import UsageError

if TYPE_CHECKING:
    from dyexport.backbones.base import Objective

DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 2e-2)  # first and last of the linear schedule of DiT (arXiv 2212.09748)
DDPM_SCHEDULERS = ("ddim", "dpm++")
FLOW_SCHEDULERS = ("euler",)


class Sampled(Protocol):
    """A preset or the spec of a bundle."""

    @property
    def name(self) -> str: ...

    @property
    def objective(self) -> Objective: ...

    @property
    def pixel_space(self) -> bool: ...


def check_scheduler(model: Sampled, name: str | None) -> str:
    """Return a scheduler's name, or the default's for None. Raises ``UsageError`` if it does not sample the model."""
    known = DDPM_SCHEDULERS if model.objective == "ddpm" else FLOW_SCHEDULERS
    if name is not None and name not in known:
        raise UsageError(f"scheduler {name!r} does not sample {model.name}; use {' or '.join(known)}")
    return name or known[0]


def make_scheduler(model: Sampled, name: str | None = None, **arguments: Any) -> Any:
    """Return a diffusers scheduler: ``ddim`` (default) or ``dpm++`` for DDPM models, ``euler`` for flow matching.

    ``arguments`` are passed to its class. Raises ``UsageError`` for a scheduler that does not sample the model.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    name = check_scheduler(model, name)
    if model.objective != "ddpm":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=DDPM_STEPS, **arguments)
    start, end = DDPM_BETAS
    betas = {"num_train_timesteps": DDPM_STEPS, "beta_schedule": "linear", "beta_start": start, "beta_end": end}
    if name == "dpm++":
        return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **betas, **arguments)
    return DDIMScheduler(clip_sample=model.pixel_space, **betas, **arguments)  # a VAE's latents are not bounded
