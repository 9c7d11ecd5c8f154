"""Inputs of calibration: reproducible, and different wherever seed, timestep or draw is."""

from __future__ import annotations

import torch

from dyexport.models.inputs import NoisedInputs
from tests.factories import tiny_preset


def drawn(seed: int, t: float = 10.0, draw: int = 0) -> torch.Tensor:
    return NoisedInputs(preset=tiny_preset(), batch_size=1, seed=seed).at(t, draw)["hidden_states"]


def test_every_seed_draws_its_own() -> None:
    seeds = (0, 1, 2**61 - 1, 2**62 - 2, 2**64 - 1)
    latents = [drawn(seed) for seed in seeds]
    assert all(torch.equal(drawn(seed), one) for seed, one in zip(seeds, latents, strict=True))
    assert not any(torch.equal(one, other) for i, one in enumerate(latents) for other in latents[:i])


def test_every_timestep_and_draw_draws_its_own() -> None:
    latents = [drawn(3, t, draw) for t in (0.0, 1e-6, 1.0, 999.0) for draw in range(3)]
    assert not any(torch.equal(one, other) for i, one in enumerate(latents) for other in latents[:i])
