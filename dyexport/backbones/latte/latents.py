"""No latents of pictures: the model makes videos. Imports no torch."""

from __future__ import annotations

from dyexport.backbones.autoencoders import ScaledLatents
from dyexport.backbones.latte.preset import LattePreset
from dyexport.errors import DataError


def latent_format(preset: LattePreset) -> ScaledLatents:
    """Raise ``DataError``."""
    raise DataError(
        f"{preset.name} makes videos of {preset.frames} frames, and a folder of pictures has none; give --data with a "
        "directory of latents, or 'synthetic'"
    )
