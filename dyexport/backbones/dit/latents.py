"""Latents of a VAE, or pixels. Imports no torch."""

from __future__ import annotations

from dyexport.backbones.autoencoders import PixelLatents, ScaledLatents
from dyexport.backbones.base import Preset


def latent_format(preset: Preset) -> ScaledLatents:
    """Return the format of a preset's latents."""
    return PixelLatents(preset.latent_shape[0]) if preset.pixel_space else ScaledLatents()
