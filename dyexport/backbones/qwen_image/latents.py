"""Latents of a VAE for videos, of one frame, normalized per channel and packed. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dyexport.backbones.autoencoders import Config, PackedLatents, pack, unpack
from dyexport.backbones.base import Preset

if TYPE_CHECKING:
    from torch import Tensor


class NormalizedLatents(PackedLatents):
    """Latents less ``latents_mean``, divided by ``latents_std``, in tokens of 2 x 2: (B, N, 4 C)."""

    vae = "AutoencoderKLQwenImage"

    def scale(self, config: Config) -> int:
        return 2 ** len(config["temperal_downsample"])

    def channels(self, config: Config) -> int:
        return int(config["z_dim"])

    def scaling(self, config: Config) -> dict[str, Any]:
        return {name: list(config[name]) for name in ("latents_mean", "latents_std")}

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)  # (B, C, H / scale, W / scale)
        mean, std = self._statistics(vae, latents)
        return pack((latents - mean) / std)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._statistics(vae, latents)
        pixels: Tensor = vae.decode((unpack(latents) * std + mean).unsqueeze(2)).sample.squeeze(2)
        return pixels

    def _statistics(self, vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation by channel: (1, C, 1, 1)."""
        mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in self.scaling(vae.config).values())
        return mean, std


def latent_format(preset: Preset) -> NormalizedLatents:
    """Return the format of latents."""
    return NormalizedLatents()
