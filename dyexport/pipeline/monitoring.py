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
from dyexport.training.trackers import check_installed
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


def check_monitoring(settings: BuildSettings) -> None:
    """Check, before hours of other work, what training runs are watched with.

    Raises ``MissingDependencyError`` for a tracker that is not installed, and ``CheckpointError`` for a VAE that is
    given and cannot be read.
    """
    if settings.tracker is not None:
        check_installed(settings.tracker)
    if settings.vae is not None and settings.evaluate_every:
        _decoder(settings).open()


def _evaluation(settings: BuildSettings) -> EvaluationSettings:
    source = held_out(settings.data_source)
    return EvaluationSettings(every=settings.evaluate_every, source=source, decoder=_decoder(settings))


def _decoder(settings: BuildSettings) -> PictureDecoder:
    preset = settings.preset
    return PictureDecoder(preset, None if preset.pixel_space else find_vae(settings.vae, pipeline_of(settings)))
