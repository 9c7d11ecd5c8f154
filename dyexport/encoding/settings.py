"""Settings of encoding, checked when they are made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from dyexport.arguments import PIXELS, whole_number
from dyexport.backbones import get_latent_format
from dyexport.backbones.autoencoders import ScaledLatents
from dyexport.backbones.base import Preset
from dyexport.checkpoints.locate import is_hub_id
from dyexport.checkpoints.structure import resolve_preset
from dyexport.encoding.layout import PictureFolder, read_folder
from dyexport.errors import CheckpointError, DataError, UsageError
from dyexport.presets import get_preset
from dyexport.training.data_record import check_classes

VAE = "vae"  # folder of a pipeline
CONFIG = "config.json"


class VaeSource(NamedTuple):
    """Place of a VAE: a directory or hub id, and a folder in it."""

    source: str
    subfolder: str | None

    @property
    def place(self) -> str:
        """Source and folder as one path."""
        return "/".join(part for part in self if part)


def find_vae(vae: str | None, pipeline: str | None) -> VaeSource | None:
    """Return the place of a VAE that is given, or of a pipeline's; None for neither."""
    if vae is not None:
        return VaeSource(vae, VAE if (Path(vae) / VAE / CONFIG).is_file() else None)
    return None if pipeline is None else VaeSource(pipeline, VAE)


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of one encoding of a folder of pictures.

    preset     the model; None: one of class labels, whose latents its VAE describes
    vae        directory or hub id of the VAE; None: that of ``pipeline``
    pipeline   directory or hub id of the model's diffusers pipeline, whose text encoders embed captions
    size       height and width of the pictures; None: the model's, or the VAE's
    buckets    True to crop each picture to one of several sizes by its aspect ratio
    flip       True to add the latents of mirrored pictures
    split      folder of a split; None: the one for training, if the folder has splits
    classes    file of class names in the order of the labels; None: names of the subfolders, sorted

    Raises ``UsageError``, ``CheckpointError`` and ``DataError``.
    """

    folder: Path
    preset: Preset | None = None
    vae: str | None = None
    pipeline: str | None = None
    size: int | None = None
    buckets: bool = False
    flip: bool = False
    split: str | None = None
    classes: Path | None = None

    def __post_init__(self) -> None:
        _ = self.format  # raises for a model of videos
        if self.size is not None:
            whole_number("--size", self.size, least=1, most=int(PIXELS**0.5))
        for option, source in (("--vae", self.vae), ("--pipeline", self.pipeline)):
            if source is not None and not Path(source).exists() and not is_hub_id(source):
                raise CheckpointError(f"{option} {source} does not exist; give a directory, or the id of a repository")
        self._check_vae()
        if self.takes_labels is False:
            self._check_text_encoders()

    def _check_vae(self) -> None:
        if self.preset is not None and self.preset.pixel_space:
            if self.vae is not None or self.pipeline is not None:
                raise UsageError(
                    f"{self.preset.name} samples pixels, which no VAE encodes; leave --vae and --pipeline out"
                )
        elif self.vae is None and self.pipeline is None:
            raise UsageError(
                "encoding pictures takes a VAE; give --vae, or the diffusers pipeline of a model that has one"
            )

    def _check_text_encoders(self) -> None:
        if self.pipeline is None:
            assert self.preset is not None
            raise UsageError(
                f"captions of {self.preset.name} are embedded by its text encoders; give a diffusers pipeline that has "
                "them: --pipeline, or --checkpoint of a build"
            )
        if Path(self.pipeline).is_dir() and not Path(self.pipeline, "model_index.json").is_file():
            raise CheckpointError(
                f"{self.pipeline} has no model_index.json, so it has no text encoders; give a whole pipeline"
            )

    @classmethod
    def complete(
        cls,
        folder: Path,
        *,
        model: str | None = None,
        pipeline: str | None = None,
        vae: str | None = None,
        **options: Any,
    ) -> Self:
        """Make settings of the model that is named, or that a pipeline is of; a named one brings its pipeline."""
        preset = None
        if model is not None:
            preset = get_preset(model)
            needs_pipeline = not preset.pixel_space and (vae is None or not preset.classes)
            pipeline = preset.hub_id if pipeline is None and needs_pipeline else pipeline
        elif pipeline is not None:
            preset = _preset_of(pipeline)
        return cls(folder=folder, preset=preset, pipeline=pipeline, vae=vae, **options)

    @property
    def format(self) -> ScaledLatents:
        """Settings by which pictures become latents."""
        return ScaledLatents() if self.preset is None else get_latent_format(self.preset)

    @property
    def takes_labels(self) -> bool | None:
        """True for a model of classes, False for one of captions; None if the model is not known."""
        return None if self.preset is None else bool(self.preset.classes)

    @property
    def vae_source(self) -> VaeSource | None:
        """Place of the VAE; None for a model of pixels."""
        return find_vae(self.vae, self.pipeline)

    def read_folder(self) -> PictureFolder:
        """List the pictures. Raises ``DataError`` for a layout or classes that do not fit the model."""
        folder = read_folder(self.folder, takes_labels=self.takes_labels, split=self.split, names=self.classes)
        if self.preset is not None and self.preset.classes:
            _check_labels(folder, self.preset)
        return folder


def _check_labels(folder: PictureFolder, preset: Preset) -> None:
    if folder.classes:
        check_classes(folder.classes, preset.classes, str(folder.root), preset.name)
        return
    largest = max(folder.pictures, key=lambda picture: picture.label or 0)
    if (largest.label or 0) >= preset.classes:
        raise DataError(
            f"{folder.name_of(largest)} in {folder.root} has the label {largest.label}, outside [0, {preset.classes}), "
            f"the classes of {preset.name}; correct it, or choose another model"
        )


def _preset_of(pipeline: str) -> Preset:
    try:
        return resolve_preset(None, pipeline)
    except CheckpointError as error:
        why = str(error).partition(";")[0]
        raise CheckpointError(
            f"--pipeline {pipeline} does not say which model it is of ({why}); give --model too, or a local copy"
        ) from error
