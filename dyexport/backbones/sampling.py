"""Contract of ``pipeline``: how samples are made from a bundle of a backbone. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dyexport.backbones.base import SamplingDefaults

if TYPE_CHECKING:
    import torch

    from dyexport.bundle.spec import ModelSpec

PromptColumns = Mapping[str, tuple[int | None, ...]]
"""Tensors of a file of embedded prompts, and their shapes after the first dimension; None: any length."""

VAE_SCALE = 8  # pixels on a side of a latent, unless a VAE says otherwise


class SamplingPipeline(ABC):
    """Sampling from a bundle of one backbone, by class labels or by prompts."""

    takes: ClassVar[Literal["labels", "prompts"]]
    task: ClassVar[str | None] = None
    """``pipeline_tag`` of a model card on the Hugging Face hub."""
    max_batch: ClassVar[int] = 8
    """Largest batch of a server by default."""

    def defaults(self, spec: ModelSpec) -> SamplingDefaults:
        """Return the model's sampling defaults."""
        from dyexport.backbones import sampling_defaults

        return sampling_defaults(spec)

    def scheduler(self, spec: ModelSpec, name: str | None = None) -> Any:
        """Return a diffusers scheduler, by default that of the model's own pipeline. Raises ``UsageError``."""
        from dyexport.noise_schedule import make_scheduler

        return make_scheduler(spec, name, **self.defaults(spec).scheduler)


class LabelPipeline(SamplingPipeline):
    """Sampling from class labels, by the loops of ``dyexport.runtime.sampling``."""

    takes = "labels"


class PromptPipeline(SamplingPipeline):
    """Sampling from prompts, by the model's pipeline in diffusers."""

    takes = "prompts"
    name: ClassVar[str]
    """The pipeline's class in diffusers."""
    text_parts: ClassVar[tuple[str, ...]]
    """Its components that embed text."""
    vae: ClassVar[str] = "AutoencoderKL"
    """Class of its VAE in diffusers."""
    batches: ClassVar[bool] = True
    """True if a sample is the same in a batch as alone."""

    def home(self, spec: ModelSpec) -> str | None:
        """Return the hub repository with the text encoders and the VAE of a model that came from one."""
        from dyexport.backbones import known_preset

        preset = known_preset(spec)
        return spec.hub_id or (None if preset is None else preset.hub_id)

    @abstractmethod
    def columns(self, spec: ModelSpec, *, guided: bool) -> PromptColumns:
        """Return the shapes of embedded prompts, by argument of the pipeline.

        ``guided``: with those of the unconditional prediction.
        """

    @abstractmethod
    def side(self, spec: ModelSpec, scale: int) -> int:
        """Return the default side of a picture in pixels; one latent of the VAE is ``scale`` pixels on a side."""

    @abstractmethod
    def arguments(
        self, spec: ModelSpec, *, frames: int | None, guidance: float | None, embedded: bool
    ) -> dict[str, Any]:
        """Return the arguments of the pipeline that not all pipelines have, its guidance scale among them.

        ``embedded``: prompts are given as embeddings. Raises ``UsageError``.
        """

    @abstractmethod
    def samples(self, output: Any) -> torch.Tensor:
        """Return the pixels or latents of what the pipeline returns."""


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the argument of a pipeline's ``from_pretrained`` that sets its dtype.

    It is ``dtype`` since diffusers 0.40, which deprecates ``torch_dtype``; before, ``dtype`` was ignored.
    """
    import diffusers

    major, minor = (int(number) for number in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 40) else "torch_dtype": dtype}
