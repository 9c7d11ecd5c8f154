"""diffusers' ``QwenImagePipeline`` around a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dyexport.backbones.qwen_image.preset import UNCONDITIONAL, QwenImagePreset
from dyexport.backbones.sampling import PromptColumns, PromptPipeline
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import UsageError

if TYPE_CHECKING:
    import torch

SIDE = 128  # latents; diffusers writes it into its pipeline


class QwenImagePictures(PromptPipeline):
    """Pictures from prompts, under classifier-free guidance in two calls of the network."""

    name = QwenImagePreset.pipeline
    task = "text-to-image"
    text_parts = ("text_encoder", "tokenizer")
    vae = "AutoencoderKLQwenImage"
    max_batch = 1  # a picture of 1024 px fills a GPU

    def columns(self, spec: ModelSpec, *, guided: bool) -> PromptColumns:
        text = {"prompt_embeds": (None, spec.config["joint_attention_dim"]), "prompt_embeds_mask": (None,)}
        return {**text, **{f"negative_{name}": shape for name, shape in text.items()}} if guided else text

    def side(self, spec: ModelSpec, scale: int) -> int:
        return SIDE * scale

    def arguments(
        self, spec: ModelSpec, *, frames: int | None, guidance: float | None, embedded: bool
    ) -> dict[str, Any]:
        if frames is not None:
            raise UsageError(f"{spec.name} makes pictures; leave --frames out")
        scale = 1.0 if guidance is None else guidance
        negative = {"negative_prompt": UNCONDITIONAL} if scale > 1 and not embedded else {}
        return {"true_cfg_scale": scale, **negative}

    def samples(self, output: Any) -> torch.Tensor:
        """Return (B, 3, H, W), or packed latents (B, N, C)."""
        values: torch.Tensor = output.images
        return values


PIPELINE = QwenImagePictures()
