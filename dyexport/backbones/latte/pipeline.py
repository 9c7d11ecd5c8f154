"""diffusers' ``LattePipeline`` around a bundle."""

from __future__ import annotations

from typing import Any

import torch

from dyexport.backbones.base import PromptColumns, PromptPipeline, SamplingDefaults
from dyexport.bundle.manifest import ModelSpec
from dyexport.errors import UsageError
from dyexport.runtime.sampling import make_scheduler


class LatteVideos(PromptPipeline):
    name = "LattePipeline"
    text_parts = ("text_encoder", "tokenizer")
    batches = False  # a lone prompt is cut to its length, those of a batch are padded with zeros, which text attends to

    def defaults(self, spec: ModelSpec) -> SamplingDefaults:
        return SamplingDefaults(steps=50, guidance=7.5)

    def columns(self, spec: ModelSpec, *, guided: bool) -> PromptColumns:
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


PIPELINE = LatteVideos()
