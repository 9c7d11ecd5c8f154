"""diffusers' ``FluxPipeline`` around a bundle."""

from __future__ import annotations

from typing import Any

import torch

from dyexport.backbones.base import PromptColumns, PromptPipeline, SamplingDefaults
from dyexport.bundle.manifest import ModelSpec
from dyexport.errors import UsageError

SIDE = 128  # latents, whatever the model; diffusers writes it into its pipeline


class FluxPictures(PromptPipeline):
    name = "FluxPipeline"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def defaults(self, spec: ModelSpec) -> SamplingDefaults:
        return SamplingDefaults(steps=28 if _distilled(spec) else 4, guidance=3.5)

    def columns(self, spec: ModelSpec, *, guided: bool) -> PromptColumns:
        config = spec.config
        return {
            "prompt_embeds": (None, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def scheduler(self, spec: ModelSpec) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=_distilled(spec))

    def side(self, spec: ModelSpec, scale: int) -> int:
        return SIDE * scale

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


PIPELINE = FluxPictures()
