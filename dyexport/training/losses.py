"""Losses: diffusion (DDPM, flow matching), distillation and the FLOPs penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from dyexport.backbones.base import Adapter, Inputs, Objective
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicOutput, DynamicTransformer
from dyexport.models.gates import GateNoise
from dyexport.noise_schedule import DDPM_BETAS, DDPM_STEPS
from dyexport.training.teacher import Teacher

FLOPS_WEIGHT = 2.0  # arXiv 2410.03456 eq. 7
TEACHER_SHARE = 0.5  # weight of the teacher in the dynamic path's loss; the rest is the weight of the data


class Noised(NamedTuple):
    """Noised data, and the prediction that the network should make."""

    latents: Tensor  # (B, *latent_shape)
    timestep: Tensor  # (B,), as the network is called
    target: Tensor  # (B, *latent_shape)
    clean: Tensor  # (B, *latent_shape)


class NoisyBatch(NamedTuple):
    """Inputs of the network, and their latents with the target."""

    inputs: Inputs
    noised: Noised


class Losses(NamedTuple):
    """Means over samples of this process; scalars that carry gradients."""

    diffusion: Tensor
    complete: Tensor | None  # of the dense model; None once it is no longer trained
    flops_ratio: Tensor | None  # None for a static model

    def detached(self) -> Losses:
        rest = (None if value is None else value.detach() for value in self[1:])
        return Losses(self.diffusion.detach(), *rest)

    @staticmethod
    def mean(parts: Sequence[Losses]) -> Losses:
        """Return the means of micro-batches of the same size."""
        rest = (_mean_of([part[index] for part in parts]) for index in (1, 2))
        return Losses(torch.stack([part.diffusion for part in parts]).mean(), *rest)


def _mean_of(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.stack(present).mean() if present else None


class DiffusionObjective(Protocol):
    """The mix of data and noise, and the loss of a prediction."""

    def noisy(self, clean: Tensor, noise: Tensor, uniform: Tensor) -> Noised:
        """Mix data (B, *latent_shape) with noise; ``uniform`` (B,) in [0, 1] gives the timesteps."""

    def loss(self, prediction: Tensor, batch: Noised) -> Tensor:
        """Return the loss of each sample from the network's output: (B,)."""


def get_objective(name: Objective) -> DiffusionObjective:
    if name == "ddpm":
        return DdpmObjective()
    return FlowObjective() if name == "flow" else SigmaFlowObjective()


class FlowObjective:
    """Velocity of the straight path from noise (t = 0) to data (t = 1), SiT, arXiv 2401.08740 section 2."""

    def noisy(self, clean: Tensor, noise: Tensor, uniform: Tensor) -> Noised:
        t = uniform[:, None, None, None]  # (B, 1, 1, 1)
        return Noised(t * clean + (1 - t) * noise, uniform, clean - noise, clean)

    def loss(self, prediction: Tensor, batch: Noised) -> Tensor:
        velocity = prediction[:, : batch.target.shape[1]]  # (B, C, H, W) without the channels of a learned sigma
        return (velocity.float() - batch.target).square().flatten(1).mean(1)  # (B,)


class SigmaFlowObjective:
    """Velocity ``noise - data`` of the same path, from data (sigma = 0) to noise (sigma = 1)."""

    def noisy(self, clean: Tensor, noise: Tensor, uniform: Tensor) -> Noised:
        sigma = uniform.view(-1, *(1,) * (clean.ndim - 1))  # (B, 1, ...)
        return Noised((1 - sigma) * clean + sigma * noise, uniform, noise - clean, clean)

    def loss(self, prediction: Tensor, batch: Noised) -> Tensor:
        return (prediction.float() - batch.target).square().flatten(1).mean(1)  # (B,)


class DdpmObjective:
    """Noise prediction over 1000 linear steps (DiT, arXiv 2212.09748 section 3.1).

    A network with 2C output channels also learns the variance, through the variational bound on the frozen mean
    (improved DDPM, arXiv 2102.09672 section 3.1). The bound is in bits per dimension and has weight 1.
    """

    def __init__(self) -> None:
        start, end = DDPM_BETAS
        self.scheduler = DDPMScheduler(DDPM_STEPS, beta_start=start, beta_end=end, beta_schedule="linear")
        self.posterior = _posterior_table()

    def noisy(self, clean: Tensor, noise: Tensor, uniform: Tensor) -> Noised:
        timestep = (uniform * DDPM_STEPS).long().clamp(max=DDPM_STEPS - 1)  # (B,)
        return Noised(self.scheduler.add_noise(clean, noise, timestep), timestep, noise, clean)

    def loss(self, prediction: Tensor, batch: Noised) -> Tensor:
        noise, *variance = prediction.float().split(batch.target.shape[1], dim=1)
        loss = (noise - batch.target).square().flatten(1).mean(1)  # (B,)
        if variance:
            loss = loss + self.variational_bound(noise.detach(), variance[0], batch)
        return loss

    def variational_bound(self, noise: Tensor, variance: Tensor, batch: Noised) -> Tensor:
        """Return the KL divergence from the true posterior to the predicted step, in bits per dimension: (B,).

        At t = 0, which has no posterior, it is the code length of the data. ``variance`` in [-1, 1] interpolates
        between the least and the largest possible variance, in log space.
        """
        per_sample = (-1, *(1,) * (noise.ndim - 1))  # (B, 1, ...)
        posterior = _Posterior(*(row.view(per_sample) for row in self.posterior.to(noise.device)[:, batch.timestep]))
        predicted = (batch.latents - posterior.noise_scale * noise) / posterior.signal_scale  # x_0, (B, C, ...)
        mean = posterior.mean(predicted, batch.latents)
        share = (variance + 1) / 2
        log_variance = share * posterior.log_beta + (1 - share) * posterior.log_variance  # (B, C, ...)
        kl = _gaussian_kl(posterior.mean(batch.clean, batch.latents), posterior.log_variance, mean, log_variance)
        code = _code_length(batch.clean, mean, log_variance)
        first = (batch.timestep == 0).view(per_sample)
        return torch.where(first, code, kl).flatten(1).mean(1) / math.log(2)


class _Posterior(NamedTuple):
    """Coefficients of q(x_{t-1} | x_t, x_0), each (B, 1, ...)."""

    clean_weight: Tensor
    noisy_weight: Tensor
    log_variance: Tensor
    log_beta: Tensor
    signal_scale: Tensor
    noise_scale: Tensor

    def mean(self, clean: Tensor, noisy: Tensor) -> Tensor:
        return self.clean_weight * clean + self.noisy_weight * noisy  # (B, C, ...)


def _posterior_table() -> Tensor:
    """Return the fields of ``_Posterior`` at every timestep: (6, 1000)."""
    beta = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64)  # (1000,)
    signal = torch.cumprod(1 - beta, dim=0)
    before = F.pad(signal[:-1], (1, 0), value=1.0)
    variance = beta * (1 - before) / (1 - signal)
    variance[0] = variance[1]  # it is 0 at t = 0; its logarithm is needed
    clean_weight = beta * before.sqrt() / (1 - signal)
    noisy_weight = (1 - before) * (1 - beta).sqrt() / (1 - signal)
    rows = (clean_weight, noisy_weight, variance.log(), beta.log(), signal.sqrt(), (1 - signal).sqrt())
    return torch.stack(rows).float()


def _gaussian_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean, ...) || N(mean2, ...)) in nats, per element."""
    spread = torch.exp(log_variance - log_variance2)
    distance = (mean - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance + spread + distance - 1)


def _code_length(clean: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the nats that code 8-bit data in [-1, 1] under a Gaussian, per element (arXiv 2006.11239, eq. 13)."""
    scale = torch.exp(-0.5 * log_variance)
    upper = torch.special.ndtr((clean - mean + 1 / 255) * scale).masked_fill(clean > 0.999, 1.0)
    lower = torch.special.ndtr((clean - mean - 1 / 255) * scale).masked_fill(clean < -0.999, 0.0)
    return -(upper - lower).clamp(min=1e-12).log()


def flops_ratio(output: DynamicOutput, flops: FlopsModel) -> Tensor:
    """Return lambda of each sample under hard gates, with straight-through gradients: (B,)."""
    return flops.flops_ratio(output.heads.mean(-1), output.groups.mean(-1), output.tokens.mean(-1))


def flops_penalty(local: Tensor, overall: Tensor, target: float) -> Tensor:
    """Return 2 (ratio - lambda)^2 of the global batch (arXiv 2410.03456 eq. 7).

    ``local`` is this process's mean ratio, ``overall`` the global one. Gradients are averaged over processes, so the
    local ratio times the global error has the gradient of the global penalty; the square of the local error has not.
    """
    error = overall.detach() - target
    return FLOPS_WEIGHT * (error.square() + 2 * error * (local - local.detach()))


class StaticLosses(nn.Module):
    """Loss of a stock backbone, as one forward pass."""

    def __init__(self, model: nn.Module, adapter: Adapter, objective: DiffusionObjective) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.objective = objective

    def forward(self, batch: NoisyBatch) -> Losses:
        sample = self.adapter.run(self.model, batch.inputs)
        return Losses(self.objective.loss(sample, batch.noised).mean(), None, None)


class DynamicLosses(nn.Module):
    """Losses of a dynamic model as one forward pass, as DistributedDataParallel needs.

    With ``distill`` the target of the dynamic path is the prediction of the dense model, which shares its weights and
    is trained at the same time (in-place distillation, arXiv 1903.05134); it has less noise than the data. A teacher
    replaces the dense model, and the data is part of the target again.
    """

    def __init__(
        self, model: DynamicTransformer, objective: DiffusionObjective, flops: FlopsModel, *, distill: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.flops = flops
        self.distill = distill

    def forward(
        self, batch: NoisyBatch, noise: GateNoise | None, *, complete: bool, teacher: Teacher | None = None
    ) -> Losses:
        output: DynamicOutput = self.model(batch.inputs, noise=noise)
        ratio = flops_ratio(output, self.flops).mean()
        if teacher is not None:
            distilled = _distance(output.sample, teacher.predict(batch.inputs))
            return Losses(torch.lerp(self._data(output.sample, batch), distilled, TEACHER_SHARE), None, ratio)
        if not complete:
            return Losses(self._data(output.sample, batch), None, ratio)
        whole = self.model.forward_dense(batch.inputs)
        dynamic = _distance(output.sample, whole.detach()) if self.distill else self._data(output.sample, batch)
        return Losses(dynamic, self._data(whole, batch), ratio)

    def _data(self, sample: Tensor, batch: NoisyBatch) -> Tensor:
        return self.objective.loss(sample, batch.noised).mean()


def _distance(sample: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance over all elements: ()."""
    return (sample.float() - target.float()).square().mean()
