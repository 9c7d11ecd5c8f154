"""diffusers' pipelines that draw from prompts, by backbone: what they are made of, called with, and give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from dyexport.errors import UsageError
from dyexport.manifest import ModelSpec
from dyexport.runtime.sampling import Habits, make_scheduler

Columns = Mapping[str, tuple[int | None, ...]]
"""Tensors of a file of embedded prompts, and their shapes after the first dimension; None: any length."""


FLUX_SIDE = 128  # latents, whatever the model; diffusers writes it into its pipeline
VAE_SCALE = 8  # pixels on a side of a latent, unless a VAE says otherwise


class PromptPipeline(ABC):
    """What sampling from prompts must know of one pipeline: its class in diffusers, its parts that embed text, ..."""

    name: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]]
    batches: ClassVar[bool] = True  # whether a sample is the same in a batch as alone

    @abstractmethod
    def habits(self, spec: ModelSpec) -> Habits:
        """Steps and guidance where none are asked for."""

    @abstractmethod
    def columns(self, spec: ModelSpec, *, guided: bool) -> Columns:
        """What embedded prompts look like; ``guided`` where an unconditional prediction is needed too."""

    @abstractmethod
    def scheduler(self, spec: ModelSpec) -> Any:
        """The schedule of the model's own pipeline."""

    @abstractmethod
    def side(self, spec: ModelSpec, scale: int) -> int:
        """Pixels on a side where no size is asked for; a VAE makes one latent of ``scale`` pixels on a side."""

    @abstractmethod
    def arguments(self, spec: ModelSpec, *, frames: int | None, embedded: bool) -> dict[str, Any]:
        """What the pipeline is called with that others do not know. Raises ``UsageError``."""

    @abstractmethod
    def drawn(self, output: Any) -> torch.Tensor:
        """Pixels or latents from what the pipeline returns."""


class FluxPictures(PromptPipeline):
    name = "FluxPipeline"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def habits(self, spec: ModelSpec) -> Habits:
        return Habits(steps=28 if _distilled(spec) else 4, guidance=3.5)

    def columns(self, spec: ModelSpec, *, guided: bool) -> Columns:
        config = spec.config
        return {
            "prompt_embeds": (None, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def scheduler(self, spec: ModelSpec) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=_distilled(spec))

    def side(self, spec: ModelSpec, scale: int) -> int:
        return FLUX_SIDE * scale

    def arguments(self, spec: ModelSpec, *, frames: int | None, embedded: bool) -> dict[str, Any]:
        if frames is not None:
            raise UsageError(f"{spec.name} draws pictures; leave --frames out")
        return {}

    def drawn(self, output: Any) -> torch.Tensor:
        """(B, 3, H, W), or packed latents (B, N, C)."""
        values: torch.Tensor = output.images
        return values


def _distilled(spec: ModelSpec) -> bool:
    """FLUX.1-dev, which embeds its guidance scale and whose steps follow the resolution; not FLUX.1-schnell."""
    return bool(spec.config["guidance_embeds"])


class LatteVideos(PromptPipeline):
    name = "LattePipeline"
    text_parts = ("text_encoder", "tokenizer")
    batches = False  # a lone prompt is cut to its length, those of a batch are padded with zeros, which text attends to

    def habits(self, spec: ModelSpec) -> Habits:
        return Habits(steps=50, guidance=7.5)

    def columns(self, spec: ModelSpec, *, guided: bool) -> Columns:
        text = (None, spec.config["caption_channels"])
        return {"prompt_embeds": text, "negative_prompt_embeds": text} if guided else {"prompt_embeds": text}

    def scheduler(self, spec: ModelSpec) -> Any:
        return make_scheduler(spec)

    def side(self, spec: ModelSpec, scale: int) -> int:
        return int(spec.config["sample_size"]) * scale

    def arguments(self, spec: ModelSpec, *, frames: int | None, embedded: bool) -> dict[str, Any]:
        if frames not in (None, 1, spec.frames):
            raise UsageError(f"--frames is {frames}; {spec.name} draws {spec.frames}, or 1")
        given = {"negative_prompt": None, "mask_feature": False} if embedded else {}  # embeddings are taken as they are
        return {"video_length": frames or spec.frames, **given}

    def drawn(self, output: Any) -> torch.Tensor:
        """(B, F, 3, H, W), or latents (B, C, F, H, W)."""
        values: torch.Tensor = output.frames
        return values


PIPELINES: Mapping[str, PromptPipeline] = {"flux": FluxPictures(), "latte": LatteVideos()}
