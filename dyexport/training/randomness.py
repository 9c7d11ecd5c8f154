"""Random numbers as a pure function of (seed, step), made for the global batch and sliced per process.

So they do not depend on the number of processes, and a resumed run sees the same numbers as an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dyexport.backbones.base import Conditioning
from dyexport.models.conditions import Conditions
from dyexport.models.inputs import seeded_generator
from dyexport.training.data import LatentSource, random_rows
from dyexport.training.losses import DiffusionObjective, NoisyBatch

Stream = Literal["data", "noise", "gates", "evaluation"]
_STREAMS: tuple[Stream, ...] = ("data", "noise", "gates", "evaluation")
TIMESTEP_BINS = 4


def step_generator(seed: int, step: int, stream: Stream, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator; different streams and steps are independent."""
    return seeded_generator(seed, step, _STREAMS.index(stream), device=device)


def stratified_uniform(count: int, generator: torch.Generator) -> Tensor:
    """Return uniform numbers (B,) that cycle through four equal bins, so that every slice covers [0, 1] evenly."""
    bins = torch.arange(count) % TIMESTEP_BINS
    return (bins + torch.rand(count, generator=generator)) / TIMESTEP_BINS  # (B,)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of a global batch: what one process works on, or one of its micro-batches."""

    index: int = 0
    count: int = 1

    def split(self, parts: int) -> list[Share]:
        """Divide this share into ``parts`` of the same size."""
        return [Share(index=self.index * parts + part, count=self.count * parts) for part in range(parts)]

    def of(self, values: Tensor) -> Tensor:
        """Return the rows of this share: (B, ...) -> (B / count, ...)."""
        return values.chunk(self.count)[self.index]


@dataclass(frozen=True, kw_only=True)
class NoisyBatches:
    """The noisy batch of every step; ``batch_size`` is global."""

    source: LatentSource
    objective: DiffusionObjective
    conditioning: Conditioning
    dropout: float  # share of samples whose condition is dropped
    batch_size: int
    seed: int
    share: Share
    device: torch.device

    def at(self, step: int) -> NoisyBatch:
        """Return this share of the batch of one step."""
        data = step_generator(self.seed, step, "data")
        indices = self.share.of(random_rows(self.source, self.batch_size, data))
        uniform = self.share.of(stratified_uniform(self.batch_size, data))
        dropped = self.share.of(torch.rand(self.batch_size, generator=data) < self.dropout)
        clean, conditions = self.source.batch(indices)
        conditions = self.conditioning.drop(conditions, dropped)
        return self.noisy(clean, conditions, self._noise(step, clean), uniform)

    def noisy(self, clean: Tensor, conditions: Conditions, noise: Tensor, uniform: Tensor) -> NoisyBatch:
        """Add noise to clean latents (B, ...), at times given by ``uniform`` (B,) in [0, 1], on the device."""
        noised = self.objective.noisy(clean.to(self.device), noise.to(self.device), uniform.to(self.device))
        moved = {name: values.to(self.device) for name, values in conditions.items()}
        return NoisyBatch(self.conditioning.inputs(noised.latents, noised.timestep, moved), noised)

    def _noise(self, step: int, like: Tensor) -> Tensor:
        generator = step_generator(self.seed, step, "noise", self.device)
        shape = (self.batch_size, *like.shape[1:])
        return self.share.of(torch.randn(shape, generator=generator, device=self.device))  # (B, *latent_shape)


class LogisticNoise:
    """Gate noise of one step, the difference of two Gumbel variables; called once per block."""

    def __init__(self, generator: torch.Generator, share: Share, scale: float) -> None:
        self.generator = generator
        self.share = share
        self.scale = scale

    def __call__(self, shape: torch.Size) -> Tensor:
        overall = (shape[0] * self.share.count, *shape[1:])
        uniform = torch.rand(overall, generator=self.generator, device=self.generator.device)
        return self.scale * torch.logit(self.share.of(uniform), eps=1e-6)
