"""Network inputs at a given t: latents with as much noise as a sampler's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Inputs, Preset
from dyexport.models.conditions import Batch
from dyexport.noise_schedule import DDPM_BETAS, DDPM_STEPS
from dyexport.progress import Progress, no_progress

ROWS = 2048  # tokens per pass, a bound on the memory of activations


def seeded_generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator, a pure function of nonnegative ``numbers``. Different numbers give independent ones."""
    entropy = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(entropy >> np.uint64(1)))


class Samples(Protocol):
    """Clean samples, read when they are needed."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """Return the samples at indices (B,)."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The samples of ``source`` at ``rows`` (n,)."""

    source: Samples
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> Batch:
        return self.source.batch(self.rows[indices])


@dataclass(frozen=True, kw_only=True)
class NoisedInputs:
    """Random inputs at any t: the same seed and t give the same tensors.

    ``clean`` has latents to which noise is added; without them the inputs are pure noise. ``rows_per_pass`` is the
    number of tokens that a pass may have.
    """

    preset: Preset
    batch_size: int
    seed: int = 0
    clean: Samples | None = None
    rows_per_pass: int = ROWS

    def at(self, t: float, repeat: int = 0, device: torch.device | str = "cpu") -> Inputs:
        """Return one batch at ``t``; every ``repeat`` is another random batch."""
        return self.over((t,), repeat, device)

    def over(self, timesteps: Sequence[float], repeat: int = 0, device: torch.device | str = "cpu") -> Inputs:
        """Return samples at every t as one batch, ``batch_size`` of each."""
        batches = [self._sample(t, repeat) for t in timesteps]
        conditions = {name: torch.cat([batch.conditions[name] for batch in batches]) for name in batches[0].conditions}
        timestep = torch.tensor(timesteps, dtype=torch.float32).repeat_interleave(self.batch_size)  # (T * B,)
        noised = torch.cat([batch.latents for batch in batches])  # (T * B, ...)
        inputs = get_conditioning(self.preset).inputs(noised, timestep, conditions)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    @property
    def rows(self) -> int:
        """Number of tokens at each t, text included."""
        return self.batch_size * (self.preset.tokens + self.preset.text_tokens)

    @property
    def per_pass(self) -> int:
        """Number of timesteps that fit into one pass."""
        return max(self.rows_per_pass // self.rows, 1)

    def chunks(self, timesteps: Sequence[float], progress: Progress = no_progress) -> Iterator[tuple[float, ...]]:
        """Yield timesteps in groups that fit into one pass: a streamed model reads its weights once per group."""
        for start in range(0, len(timesteps), self.per_pass):
            progress(start, len(timesteps))
            yield tuple(timesteps[start : start + self.per_pass])
        progress(len(timesteps), len(timesteps))

    def _sample(self, t: float, repeat: int) -> Batch:
        generator = seeded_generator(self.seed, round(t * 1e6), repeat)
        if self.clean is None:
            conditions = get_conditioning(self.preset).random(self.batch_size, generator)
            return Batch(torch.randn(self.batch_size, *self.preset.latent_shape, generator=generator), conditions)
        rows = torch.randint(len(self.clean), (self.batch_size,), generator=generator)
        clean = self.clean.batch(rows)
        return Batch(self._noised(clean.latents, t, generator), clean.conditions)

    def _noised(self, latents: Tensor, t: float, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latents.shape, generator=generator)  # (B, ...)
        signal, sigma = signal_and_noise(self.preset, t)
        return signal * latents + sigma * noise


def signal_and_noise(preset: Preset, t: float) -> tuple[float, float]:
    """Return the scales of data and noise in a latent at ``t``: x_t = signal * data + noise * eps."""
    if preset.objective != "ddpm":
        return (t, 1.0 - t) if preset.objective == "flow" else (1.0 - t, t)
    betas = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64)
    alpha_bar = float(torch.cumprod(1 - betas, dim=0)[min(int(t), DDPM_STEPS - 1)])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
