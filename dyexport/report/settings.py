"""Settings of a report, checked when they are made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dyexport.arguments import check_seed, check_steps, shown, whole_number
from dyexport.backbones import get_pipeline, sampling_defaults
from dyexport.errors import StorageError, UsageError
from dyexport.files import check_file
from dyexport.noise_schedule import check_scheduler
from dyexport.runtime.locating import check_source
from dyexport.samples import DEFAULT_CLASSES, useless_arguments

if TYPE_CHECKING:
    from dyexport.bundle.spec import ModelSpec

MOST_SAMPLES = 64
PROMPTS = ("a lighthouse at dusk", "a bowl of oranges on a wooden table")
SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of a report.

    target      engine format that samples and is verified
    samples     pictures of each model; None: one for each of the first ten classes, or one for each prompt
    seed        of the first sample; the others count up from it
    steps       denoising steps; None: the model's default
    scheduler   of class-conditional models; None: the model's default
    pictures    sample at all
    prompts     texts for models that are sampled from prompts; none: two of ours
    pipeline    text encoders and VAE of such a model: a directory or hub repository
    vae         ``AutoencoderKL`` that decodes latents of class-conditional models
    """

    target: str = "onnx"
    samples: int | None = None
    seed: int = 0
    steps: int | None = None
    scheduler: str | None = None
    pictures: bool = True
    prompts: tuple[str, ...] = ()
    pipeline: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.samples is not None:
            whole_number("--samples", self.samples, least=1, most=MOST_SAMPLES)
        check_seed(self.seed, "--seed")
        if self.steps is not None:
            check_steps(self.steps, "--steps")

    def steps_for(self, spec: ModelSpec) -> int:
        """Return the denoising steps of a model."""
        return self.steps or sampling_defaults(spec).steps

    def labels_for(self, spec: ModelSpec) -> list[int]:
        """Return the class of each sample: the classes in turn."""
        count = self.samples or min(spec.classes, DEFAULT_CLASSES)
        return [index % spec.classes for index in range(count)]

    def prompts_for(self) -> list[str]:
        """Return the prompt of each sample: the prompts in turn."""
        prompts = self.prompts or PROMPTS
        return [prompts[index % len(prompts)] for index in range(self.samples or len(prompts))]

    def check_for(self, spec: ModelSpec) -> None:
        """Raise what ``sample`` raises for settings that do not fit a model, as far as its manifest tells."""
        useless = useless_arguments(spec)
        given = {"prompts": self.prompts or None, "pipeline": self.pipeline, "vae": self.vae}
        for name, value in (given | {"scheduler": self.scheduler}).items():
            if value is not None and name in useless:
                option = "prompt" if name == "prompts" else name
                raise UsageError(f"--{option} does nothing here: {useless[name]}; leave it out")
        if get_pipeline(spec.backbone).takes == "labels":
            check_scheduler(spec, self.scheduler)
        elif self.prompts and self.pipeline is None:
            raise UsageError("--prompt is for a pipeline that embeds it; give --pipeline too, or leave it out")
        if self.pipeline is not None and self.vae is not None:
            raise UsageError("--vae does nothing here: a pipeline has its own; leave it out")
        if self.pipeline is not None:
            check_source(self.pipeline, "text encoders and VAE")
        if self.vae is not None:
            check_source(self.vae, "an AutoencoderKL")


def check_output(out: Path | None, bundle: Path) -> Path:
    """Return the file to write, by default the bundle's name with .html added. Raises ``UsageError``."""
    out = out or Path(f"{bundle.resolve().name}.html")
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"-o is {shown(str(out))}; a report goes into .html")
    try:
        check_file(out)
    except StorageError as error:
        raise UsageError(str(error)) from error
    return out
