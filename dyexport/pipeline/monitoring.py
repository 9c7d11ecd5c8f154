"""Curves and pictures that a build keeps of its training runs, and the settings of evaluations."""

from __future__ import annotations

from pathlib import Path

from dyexport import __version__
from dyexport.encoding.decoding import PictureDecoder
from dyexport.encoding.settings import find_vae
from dyexport.pipeline.pictures import pipeline_of
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.work_directory import TRACKING
from dyexport.training.data import held_out
from dyexport.training.evaluation import EvaluationSettings
from dyexport.training.tracking import Monitoring


def monitoring_of(settings: BuildSettings, scratch: Path) -> Monitoring:
    """Return what is kept of the run of a stage, which has its state in ``scratch``."""
    labels = {"data": settings.data_source, "checkpoint": settings.checkpoint, "dyexport": __version__}
    return Monitoring(
        directory=settings.work / TRACKING / scratch.name,
        tracker=settings.tracker,
        labels={name: value for name, value in labels.items() if value is not None},
        evaluation=_evaluation(settings) if settings.evaluate_every else None,
    )


def _evaluation(settings: BuildSettings) -> EvaluationSettings:
    """Return how a model is evaluated. Raises ``CheckpointError`` for a VAE that is given and cannot be read."""
    preset = settings.preset
    decoder = PictureDecoder(preset, None if preset.pixel_space else find_vae(settings.vae, pipeline_of(settings)))
    if settings.vae is not None:
        decoder.open()
    return EvaluationSettings(every=settings.evaluate_every, source=held_out(settings.data_source), decoder=decoder)
