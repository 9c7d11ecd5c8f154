"""Settings of ``eval``, checked when they are made. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

from dyexport.arguments import check_guidance, check_side, check_steps, shown, whole_number
from dyexport.backbones import get_pipeline, sampling_defaults
from dyexport.backbones.sampling import VAE_SCALE
from dyexport.bench.settings import parse_sizes
from dyexport.bench.sizes import PATCH, Size, check_sizes
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.engines.registry import engine_files
from dyexport.errors import DataError, UsageError, reason
from dyexport.evaluation.data_sets import DATA_SETS, data_set_of
from dyexport.noise_schedule import check_scheduler
from dyexport.runtime.locating import check_source
from dyexport.runtime.prompt_settings import prompt_pipeline

MOST_SAMPLES = 100_000
MOST_SUBSET = 10_000
SEEDS = 1000  # at most
PIXEL_SAMPLES, LATENT_SAMPLES, PROMPT_SAMPLES = 1800, 64, 8  # defaults: what a CPU samples in minutes
SUBSET = 1000  # samples of one estimate of the kernel distance, as published (arXiv 1801.01401)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling of an evaluation. None stands for the model's default.

    samples    pictures or videos of each model, for every seed; with class labels, the same number of each class
    guidance   of class-conditional models the default is 1, no guidance, as Frechet distances are published
    scheduler  of class-conditional models
    """

    samples: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.samples is not None:
            cure = f"a distance needs at least 2, and is of up to {MOST_SAMPLES}"
            whole_number("--samples", self.samples, least=2, most=MOST_SAMPLES, cure=cure)
        if self.steps is not None:
            check_steps(self.steps, "--steps")
        if self.guidance is not None:
            check_guidance(self.guidance, "--guidance")

    def complete(self, spec: ModelSpec) -> SamplingConfig:
        """Return the settings with the defaults of a model filled in; guidance stays None where it takes none."""
        defaults, by_labels = sampling_defaults(spec), _by_labels(spec)
        by_size = PIXEL_SAMPLES if spec.pixel_space else LATENT_SAMPLES
        return replace(
            self,
            samples=self.samples or (by_size if by_labels else PROMPT_SAMPLES),
            steps=self.steps or defaults.steps,
            guidance=self.guidance if self.guidance is not None else 1.0 if by_labels else defaults.guidance,
        )


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings of an evaluation.

    sampling    samples, steps and guidance
    seeds       every model is sampled with each; equal seeds start from equal noise
    target      engine format to run
    features    what computes features of pictures: a built-in data set, a TorchScript file, or a model of transformers
    real        reference of distances: a built-in data set, a folder of pictures, or a file of features, pictures or
                latents
    subset      samples of one estimate of the kernel distance
    classifier  what names the class of a picture: a built-in data set, a TorchScript file, or a model of transformers
    clip        a CLIP model of transformers, which compares pictures with their prompts
    prompts     texts; repeated where there are more samples
    pipeline    text encoders and VAE of a model of prompts: a directory or hub repository
    vae         VAE of a class-conditional model: a directory or hub repository
    size        height and width in pixels; None: the size that the bundle was built for
    control     diffusers directory of the static model that was trained as long as the dynamic one
    """

    sampling: SamplingConfig = SamplingConfig()
    seeds: tuple[int, ...] = (0,)
    target: str = "onnx"
    features: str | None = None
    real: str | None = None
    subset: int = SUBSET
    classifier: str | None = None
    clip: str | None = None
    prompts: tuple[str, ...] = ()
    pipeline: str | None = None
    vae: str | None = None
    size: Size | None = None
    control: Path | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UsageError("there are no seeds; give at least one")
        whole_number("--subset", self.subset, least=2, most=MOST_SUBSET)
        engine_files(self.target)

    def complete(self, spec: ModelSpec) -> EvalSettings:
        """Return the settings with the defaults of a model filled in: its built-in data set, if it has one."""
        sampling = self.sampling.complete(spec)
        own = data_set_of(spec)
        if own is None:
            return replace(self, sampling=sampling)
        return replace(
            self,
            sampling=sampling,
            features=self.features or own,
            real=self.real or own,
            classifier=self.classifier or own,
        )

    def check_for(self, bundle: Bundle) -> None:
        """Check settings against a bundle, as far as its manifest tells.

        Raises ``UsageError`` for one that does nothing with the bundle or cannot be used, ``CheckpointError`` and
        ``DataError`` for files that do not exist.
        """
        spec = bundle.manifest.model
        for name, because in _useless(spec, self):
            raise UsageError(f"--{name} does nothing here: {because}; leave it out")
        check_scheduler(spec, self.sampling.scheduler)
        if self.size is not None:
            check_sizes(bundle, (self.size,))
        _check_sources(self, spec)


def _useless(spec: ModelSpec, settings: EvalSettings) -> Iterator[tuple[str, str]]:
    """Yield the settings that are given and do nothing for a model, each with the reason."""
    by_labels = _by_labels(spec)
    for name in ("prompts", "pipeline", "clip", "size") if by_labels else ("vae", "classifier"):
        if getattr(settings, name):
            yield name, f"{spec.name} samples from {'class labels' if by_labels else 'prompts'}"
    if not by_labels and settings.sampling.scheduler is not None:
        yield "scheduler", f"the scheduler of {spec.name} comes with its pipeline"
    if spec.pixel_space and settings.vae:
        yield "vae", f"{spec.name} samples pixels, not latents"
    if sampling_defaults(spec).guidance is None and settings.sampling.guidance is not None:
        yield "guidance", f"{spec.name} takes no guidance"
    yield from _without_pixels(spec, settings)
    if settings.features and not settings.real and data_set_of(spec) is None:
        yield "features", "features are for distances to --real"
    if settings.subset != SUBSET and not settings.real and data_set_of(spec) is None:
        yield "subset", "it is for the kernel distance to --real"


def _without_pixels(spec: ModelSpec, settings: EvalSettings) -> Iterator[tuple[str, str]]:
    """Yield the settings that are for pictures, where the samples are latents."""
    if has_pixels(spec, settings):
        return
    cure = f"give {'--vae' if _by_labels(spec) else '--pipeline'} to make pictures of them"
    for name in ("features", "classifier", "clip"):
        if getattr(settings, name):
            yield name, f"samples of {spec.name} are latents ({cure})"


def _check_sources(settings: EvalSettings, spec: ModelSpec) -> None:
    if settings.pipeline is not None:
        prompt_pipeline(spec)
        check_source(settings.pipeline, "text encoders and VAE")
    if settings.vae is not None:
        check_source(settings.vae, "an AutoencoderKL")
    for name, what in (("features", "a feature extractor"), ("classifier", "a classifier"), ("clip", "a CLIP model")):
        if (source := getattr(settings, name)) not in (None, *DATA_SETS):
            check_source(source, what)
    if settings.real is not None and settings.real not in DATA_SETS and not Path(settings.real).exists():
        raise DataError(
            f"--real is {settings.real}, which does not exist; give a folder of pictures, a .safetensors or a .npz file"
        )
    _check_reference(settings, spec)
    for name in ("features", "real", "classifier"):
        if (source := getattr(settings, name)) in DATA_SETS and source != data_set_of(spec):
            raise UsageError(f"--{name} is {source}, and {spec.name} samples none; give a file, a folder or a hub id")


def _check_reference(settings: EvalSettings, spec: ModelSpec) -> None:
    """Raise ``UsageError`` for a reference of pictures that nothing computes features of."""
    if settings.real is None or data_set_of(spec) is not None:
        return
    if has_pixels(spec, settings):
        if settings.features is None:
            raise UsageError("--real needs what computes features of pictures; give --features")
    elif Path(settings.real).is_dir():
        cure = "--vae" if _by_labels(spec) else "--pipeline"
        raise UsageError(
            f"--real is {settings.real}, a folder of pictures, and samples of {spec.name} are latents; give {cure} to "
            "make pictures of them, or a file of latents"
        )


def has_pixels(spec: ModelSpec, settings: EvalSettings) -> bool:
    """Return whether samples are pictures rather than latents."""
    return bool(spec.pixel_space or settings.vae or settings.pipeline or settings.prompts)


def _by_labels(spec: ModelSpec) -> bool:
    return get_pipeline(spec.backbone).takes == "labels"


def parse_size(text: str) -> Size:
    """Parse ``512`` or ``768x1024``, height before width. Raises ``UsageError``."""
    sizes = parse_sizes(text)
    if len(sizes) > 1:
        raise UsageError(f"--size is {shown(text)}; give one size")
    for side in sizes[0]:
        check_side(side, "--size")
    return sizes[0]


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read one prompt a line; empty lines are left out. Raises ``DataError``."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read --prompts {file}: {reason(error)}; give a text file, one prompt a line"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DataError(f"--prompts {file} holds no prompts; write one a line")
    return prompts


def built_size(spec: ModelSpec) -> Size:
    """Return the height and width in pixels that a model of prompts was built for."""
    if len(spec.latent_shape) > 2:
        height, width = spec.latent_shape[-2:]
        return height * VAE_SCALE, width * VAE_SCALE
    side = isqrt(spec.tokens) * PATCH * VAE_SCALE  # packed latents
    return side, side
