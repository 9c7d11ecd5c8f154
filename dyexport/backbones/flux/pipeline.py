"""diffusers' ``FluxPipeline`` around a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dyexport.backbones.flux.preset import FluxPreset
from dyexport.backbones.sampling import PromptColumns, PromptPipeline
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import UsageError

if TYPE_CHECKING:
    import torch

SIDE = 128  # latents; diffusers writes it into its pipeline


class FluxPictures(PromptPipeline):
    """Pictures from prompts."""

    name = FluxPreset.pipeline
    task = "text-to-image"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    max_batch = 1  # a picture of 1024 px fills a GPU

    def columns(self, spec: ModelSpec, *, guided: bool) -> PromptColumns:
        config = spec.config
        return {
            "prompt_embeds": (None, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def side(self, spec: ModelSpec, scale: int) -> int:
        return SIDE * scale

    def arguments(
        self, spec: ModelSpec, *, frames: int | None, guidance: float | None, embedded: bool
    ) -> dict[str, Any]:
        if frames is not None:
            raise UsageError(f"{spec.name} makes pictures; leave --frames out")
        return {} if guidance is None else {"guidance_scale": guidance}

    def samples(self, output: Any) -> torch.Tensor:
        """Return (B, 3, H, W), or packed latents (B, N, C)."""
        values: torch.Tensor = output.images
        return values


PIPELINE = FluxPictures()
