"""Latents of a VAE, packed. Imports no torch."""

from __future__ import annotations

from dyexport.backbones.autoencoders import PackedLatents
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.errors import DataError


def latent_format(preset: FluxPreset) -> PackedLatents:
    """Return the format of latents. Raises ``DataError`` for a model whose conditions are pictures too."""
    if preset.context_channels:
        raise DataError(
            f"{preset.name} edits pictures, and a folder does not say what is edited; give --data with a directory of "
            "latents and their context"
        )
    return PackedLatents()
