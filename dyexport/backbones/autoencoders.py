"""Contract of ``latents``: how pictures become what a backbone denoises. Imports no torch.

Latents are the mode of the VAE's posterior, not a sample: training reads each picture many times, and one sample kept
on disk would add the same noise every time. The mode needs no seed either, so shards do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from dyexport.backbones.base import Preset

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
"""Configuration of a VAE in diffusers."""


class ScaledLatents:
    """Latents of diffusers' ``AutoencoderKL``, shifted and scaled by its configuration: (B, C, H, W)."""

    vae: str = "AutoencoderKL"
    several_sizes: bool = False
    """True if a model takes pictures of several sizes, whose latents are then tokens."""

    def scale(self, config: Config) -> int:
        """Return the pixels along an edge of a latent."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    def multiple(self, config: Config) -> int:
        """Return the number of pixels that height and width must be a multiple of."""
        return self.scale(config)

    def side(self, preset: Preset, config: Config) -> int:
        """Return the height and width of the model's pictures, in pixels."""
        return preset.latent_shape[-1] * self.scale(config)

    def channels(self, config: Config) -> int:
        """Return the channels of a latent."""
        return int(config["latent_channels"])

    def shape(self, config: Config, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of a picture in pixels."""
        scale = self.scale(config)
        return self.channels(config), height // scale, width // scale

    def scaling(self, config: Config) -> dict[str, Any]:
        """Return what latents are shifted and scaled by, for the record."""
        return {"scaling_factor": config["scaling_factor"], "shift_factor": config.get("shift_factor") or 0.0}

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1]."""
        scaling = self.scaling(vae.config)
        latents = vae.encode(pixels).latent_dist.mode()  # (B, C, H / scale, W / scale)
        return (latents - scaling["shift_factor"]) * scaling["scaling_factor"]

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode latents to pixels (B, 3, H, W) in [-1, 1] and somewhat beyond; packed ones are of a square."""
        scaling = self.scaling(vae.config)
        pixels: Tensor = vae.decode(latents / scaling["scaling_factor"] + scaling["shift_factor"]).sample
        return pixels


class PackedLatents(ScaledLatents):
    """Scaled latents in tokens of 2 x 2: (B, N, 4 C)."""

    several_sizes = True

    def multiple(self, config: Config) -> int:
        return 2 * self.scale(config)

    def side(self, preset: Preset, config: Config) -> int:
        return isqrt(preset.tokens) * 2 * self.scale(config)

    def shape(self, config: Config, height: int, width: int) -> tuple[int, ...]:
        channels, rows, columns = super().shape(config, height, width)
        return (rows // 2) * (columns // 2), 4 * channels

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        return pack(super().encode(vae, pixels))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return super().decode(vae, unpack(latents))


class PixelLatents(ScaledLatents):
    """Pixels in [-1, 1], of a model without a VAE."""

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def scale(self, config: Config) -> int:
        return 1

    def channels(self, config: Config) -> int:
        return self._channels

    def scaling(self, config: Config) -> dict[str, Any]:
        return {}

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return latents


def pack(latents: Tensor) -> Tensor:
    """Gather 2 x 2 latents into a token: (B, C, H, W) -> (B, H W / 4, 4 C)."""
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor) -> Tensor:
    """Return the inverse of ``pack`` for a square: (B, N, 4 C) -> (B, C, 2 sqrt(N), 2 sqrt(N))."""
    batch, count, channels = tokens.shape
    side = isqrt(count)
    split = tokens.reshape(batch, side, side, channels // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * side, 2 * side)
