"""Latents to pictures, to look at while a model is trained."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dyexport.backbones import get_latent_format
from dyexport.backbones.autoencoders import ScaledLatents
from dyexport.backbones.base import Preset
from dyexport.encoding.encoders import open_vae
from dyexport.encoding.settings import VaeSource
from dyexport.errors import CheckpointError
from dyexport.models.devices import best_device


class PictureDecoder:
    """The VAE of a model, which is opened when it is first used and kept on the CPU; none for a model of pixels."""

    def __init__(self, preset: Preset, source: VaeSource | None) -> None:
        self.preset = preset
        self.source = source

    def open(self) -> None:
        """Raise ``CheckpointError`` or ``DataError`` if latents of this model cannot be decoded."""
        form = self._format
        if self.preset.pixel_space:
            return
        config = self._vae.config
        assert self.source is not None  # or there would be no VAE
        side = form.side(self.preset, config)
        if (shape := form.shape(config, side, side)) != self.preset.latent_shape:
            takes = f"{self.preset.name} takes {self.preset.latent_shape}"
            raise CheckpointError(
                f"the VAE in {self.source.place} has latents {shape}, and {takes}; give its own --vae"
            )

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents (B, *latent_shape) one by one to pixels (B, C, H, W) in [-1, 1], on the CPU."""
        if self.preset.pixel_space:
            return self._format.decode(None, latents).cpu().clamp(-1, 1)
        vae = self._vae.to(best_device())
        try:
            pixels = [self._format.decode(vae, one.to(vae.device, vae.dtype)).float().cpu() for one in latents.split(1)]
        finally:
            vae.to("cpu")
        return torch.cat(pixels).clamp(-1, 1)

    @cached_property
    def _format(self) -> ScaledLatents:
        return get_latent_format(self.preset)

    @cached_property
    def _vae(self) -> Any:
        if self.source is None:
            raise CheckpointError(f"no VAE is known for {self.preset.name}; give --vae to see pictures")
        return open_vae(self.source, self._format.vae)
