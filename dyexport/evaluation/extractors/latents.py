"""Latents as their own features, where nothing decodes them."""

from __future__ import annotations

import torch


class LatentFeatures:
    """The values of latents (B, C, H, W), flat: (B, C * H * W)."""

    name = "latents, flattened"

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.flatten(1).double()
