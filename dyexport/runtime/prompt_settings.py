"""How to sample from prompts, checked when it is made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyexport.arguments import SAMPLES, check_guidance, check_side, check_steps
from dyexport.backbones import get_pipeline
from dyexport.backbones.sampling import PromptPipeline
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import DataError, UsageError
from dyexport.runtime.locating import check_source


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts, and how to sample from them. None stands for the model's default.

    texts            the prompts
    embedded         instead of ``texts``: a safetensors file of their embeddings
    pipeline         text encoders and VAE: a directory or hub repository; not needed for embedded prompts
    vae              VAE for embedded prompts, where there is no ``pipeline``
    height, width    in pixels
    frames           of a video; 1 for a picture
    seed             one for the batch, or one per prompt
    """

    texts: tuple[str, ...] = ()
    embedded: Path | None = None
    pipeline: str | None = None
    vae: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    seed: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if bool(self.texts) == (self.embedded is not None):
            raise UsageError("give --prompt, or --prompt-embeds with a file of embedded prompts; one of the two")
        if len(self.texts) > SAMPLES:
            raise UsageError(f"there are {len(self.texts)} prompts; give up to {SAMPLES} at a time")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_side(getattr(self, name), f"--{name}")
        if self.steps is not None:
            check_steps(self.steps, "--steps")
        if self.guidance is not None:
            check_guidance(self.guidance, "--guidance")
        if self.vae is not None and (self.texts or self.pipeline):
            raise UsageError("--vae goes with --prompt-embeds alone; a pipeline has its own")

    def guidance_for(self, spec: ModelSpec) -> float | None:
        """Return the guidance scale, by default the model's. Raises ``UsageError`` for a model that takes none."""
        default = prompt_pipeline(spec).defaults(spec).guidance
        if self.guidance is not None and default is None:
            raise UsageError(f"guidance is {self.guidance:g}, and {spec.name} takes none; leave it out")
        return default if self.guidance is None else self.guidance

    def check_sources(self, spec: ModelSpec) -> None:
        """Check where prompts are embedded or read from.

        Raises ``UsageError`` for texts without a pipeline, ``CheckpointError`` and ``DataError`` for what is not there.
        """
        if self.texts and self.pipeline is None:
            raise UsageError(
                f"no text encoders of {spec.name} are known; give --pipeline with the directory of a diffusers "
                "pipeline that has them, or --prompt-embeds with a file of embedded prompts"
            )

        if self.pipeline is not None:
            check_source(self.pipeline, "text encoders and VAE")
        if self.vae is not None:
            check_source(self.vae, f"an {prompt_pipeline(spec).vae}")
        if self.embedded is not None and not self.embedded.exists():
            raise DataError(f"cannot read {self.embedded}: it does not exist; give a safetensors file of prompts")

    def arguments_for(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the arguments that not all pipelines take. Raises ``UsageError`` for what the model cannot sample."""
        return prompt_pipeline(spec).arguments(
            spec, frames=self.frames, guidance=self.guidance_for(spec), embedded=self.embedded is not None
        )


def prompt_pipeline(spec: ModelSpec) -> PromptPipeline:
    """Return the pipeline that samples a model from prompts. Raises ``UsageError`` for a model of class labels."""
    pipeline = get_pipeline(spec.backbone)
    if not isinstance(pipeline, PromptPipeline):
        raise UsageError(f"{spec.name} is sampled from class labels, not from prompts; see dyexport.runtime.sampling")
    return pipeline
