"""Network inputs at a given t: noised latents, as the sampler would present them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyexport.presets import Preset

DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 2e-2)  # linear schedule of DiT


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Keyword arguments of one forward pass."""

    hidden_states: Tensor  # (B, C, H, W)
    timestep: Tensor  # (B,)
    class_labels: Tensor  # (B,)

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        tensors = {"hidden_states": self.hidden_states, "timestep": self.timestep, "class_labels": self.class_labels}
        return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class NoisedInputs:
    """Draws inputs at any t, reproducibly: the same seed and t give the same tensors.

    ``latents`` (n, C, H, W) with ``labels`` (n,) are clean samples; without them the network is fed
    pure noise, which is what a model with random weights deserves.
    """

    preset: Preset
    batch_size: int
    seed: int = 0
    latents: Tensor | None = None
    labels: Tensor | None = None

    def at(self, t: float, draw: int = 0) -> ModelInputs:
        generator = torch.Generator().manual_seed(hash((self.seed, round(t * 1e6), draw)) % 2**63)
        clean, labels = self._clean(generator)
        noise = torch.randn(clean.shape, generator=generator)  # (B, C, H, W)
        signal, sigma = signal_and_noise(self.preset, t)
        noised = noise if self.latents is None else signal * clean + sigma * noise
        return ModelInputs(hidden_states=noised, timestep=torch.full((self.batch_size,), t), class_labels=labels)

    def _clean(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.latents is None or self.labels is None:
            size = self.preset.sample_size
            labels = torch.randint(self.preset.classes + 1, (self.batch_size,), generator=generator)
            return torch.zeros(self.batch_size, self.preset.in_channels, size, size), labels
        rows = torch.randint(len(self.latents), (self.batch_size,), generator=generator)
        return self.latents[rows], self.labels[rows]


def signal_and_noise(preset: Preset, t: float) -> tuple[float, float]:
    """How much data and how much noise a latent at ``t`` holds: x_t = signal * data + noise * eps."""
    if preset.objective == "flow":
        return t, 1.0 - t
    betas = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64)
    alpha_bar = float(torch.cumprod(1 - betas, dim=0)[min(int(t), DDPM_STEPS - 1)])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
