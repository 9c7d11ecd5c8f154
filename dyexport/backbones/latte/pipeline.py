"""diffusers' ``LattePipeline`` around a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dyexport.backbones.latte.preset import LattePreset
from dyexport.backbones.sampling import PromptColumns, PromptPipeline
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import UsageError

if TYPE_CHECKING:
    import torch


class LatteVideos(PromptPipeline):
    """Videos from prompts."""

    name = LattePreset.pipeline
    task = "text-to-video"
    text_parts = ("text_encoder", "tokenizer")
    max_batch = 1  # a video fills a GPU
    batches = False  # a lone prompt is cut to its length; those of a batch are padded with zeros, which are attended to

    def columns(self, spec: ModelSpec, *, guided: bool) -> PromptColumns:
        text = (None, spec.config["caption_channels"])
        return {"prompt_embeds": text, "negative_prompt_embeds": text} if guided else {"prompt_embeds": text}

    def side(self, spec: ModelSpec, scale: int) -> int:
        return int(spec.config["sample_size"]) * scale

    def arguments(
        self, spec: ModelSpec, *, frames: int | None, guidance: float | None, embedded: bool
    ) -> dict[str, Any]:
        if frames not in (None, 1, spec.frames):
            raise UsageError(f"--frames is {frames}; {spec.name} makes {spec.frames}, or 1")
        as_given = {"negative_prompt": None, "mask_feature": False} if embedded else {}  # embeddings stay as they are
        return {"video_length": frames or spec.frames, "guidance_scale": guidance, **as_given}

    def samples(self, output: Any) -> torch.Tensor:
        """Return (B, F, 3, H, W), or latents (B, C, F, H, W)."""
        values: torch.Tensor = output.frames
        return values


PIPELINE = LatteVideos()
