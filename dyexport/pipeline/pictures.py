"""Settings for encoding the pictures of a build. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dyexport.checkpoints.locate import TRANSFORMER, is_hub_id
from dyexport.encoding.layout import is_picture_folder
from dyexport.encoding.settings import CONFIG, VAE, EncodeSettings
from dyexport.training.data_files import BUILT_IN

INDEX = "model_index.json"  # of a pipeline

if TYPE_CHECKING:
    from dyexport.pipeline.settings import BuildSettings


def picture_folder(settings: BuildSettings) -> Path | None:
    """Return the folder of pictures that become the data of a build; None for other data."""
    source = settings.data_source
    if source is None or source in (*BUILT_IN, "synthetic"):
        return None
    return Path(source) if is_picture_folder(Path(source)) else None


def picture_settings(settings: BuildSettings) -> EncodeSettings:
    """Return how a build encodes the pictures of its data.

    Raises ``UsageError`` where no VAE is given or known, and ``DataError`` for a model that pictures are no data for.
    """
    preset = settings.preset
    pipeline = None if preset.pixel_space else pipeline_of(settings)
    return EncodeSettings(folder=Path(str(settings.data_source)), preset=preset, vae=settings.vae, pipeline=pipeline)


def vae_of_pictures(settings: BuildSettings) -> str | None:
    """Return the place of the VAE that encodes the pictures of a build; None for other data and for pixels."""
    if picture_folder(settings) is None:
        return None
    source = picture_settings(settings).vae_source
    return None if source is None else source.place


def pipeline_of(settings: BuildSettings) -> str | None:
    """Return the pipeline with the VAE of a checkpoint, or of the published model; None if none is known."""
    if settings.checkpoint is not None:
        checkpoint = Path(settings.checkpoint)
        parent = checkpoint.parent
        in_pipeline = checkpoint.name == TRANSFORMER or (parent / INDEX).is_file()
        for folder in (checkpoint, parent) if in_pipeline else (checkpoint,):
            if (folder / VAE / CONFIG).is_file():
                return str(folder)
        if not checkpoint.exists() and is_hub_id(settings.checkpoint):
            return settings.checkpoint
    return settings.preset.hub_id
