"""Network inputs at a given t: noised latents, as the sampler would present them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyexport.models.base import Inputs
from dyexport.models.conditioning import Batch, get_conditioning
from dyexport.presets import Preset

DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 2e-2)  # linear schedule of DiT


@dataclass(frozen=True, kw_only=True)
class NoisedInputs:
    """Draws inputs at any t, reproducibly: the same seed and t give the same tensors.

    ``clean`` holds samples to draw from; without them the network is fed pure noise, which is what a
    model with random weights deserves.
    """

    preset: Preset
    batch_size: int
    seed: int = 0
    clean: Batch | None = None

    def at(self, t: float, draw: int = 0, device: torch.device | str = "cpu") -> Inputs:
        generator = torch.Generator().manual_seed(hash((self.seed, round(t * 1e6), draw)) % 2**63)
        conditioning = get_conditioning(self.preset)
        if self.clean is None:
            conditions = conditioning.random(self.batch_size, generator)
            noised = torch.randn(self.batch_size, *self.preset.latent_shape, generator=generator)  # (B, ...)
        else:
            rows = torch.randint(len(self.clean.latents), (self.batch_size,), generator=generator)
            conditions = {name: values[rows] for name, values in self.clean.conditions.items()}
            noised = self._noised(self.clean.latents[rows], t, generator)
        inputs = conditioning.inputs(noised, torch.full((self.batch_size,), t), conditions)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _noised(self, latents: Tensor, t: float, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latents.shape, generator=generator)  # (B, ...)
        signal, sigma = signal_and_noise(self.preset, t)
        return signal * latents + sigma * noise


def signal_and_noise(preset: Preset, t: float) -> tuple[float, float]:
    """How much data and how much noise a latent at ``t`` holds: x_t = signal * data + noise * eps."""
    if preset.objective != "ddpm":
        return (t, 1.0 - t) if preset.objective == "flow" else (1.0 - t, t)
    betas = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64)
    alpha_bar = float(torch.cumprod(1 - betas, dim=0)[min(int(t), DDPM_STEPS - 1)])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
