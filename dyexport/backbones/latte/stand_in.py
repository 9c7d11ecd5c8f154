"""Stand-in for diffusers' ``LatteTransformer3DModel``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.bundle.spec import ModelSpec
from dyexport.errors import EngineMismatchError
from dyexport.runtime.inputs import (
    check_absent,
    floating,
)
from dyexport.runtime.stock import random_rows
from dyexport.runtime.transformer import NOT_COMPILED, BundleTransformer


class LatteBundle(BundleTransformer, LatteTransformer3DModel):
    """Stands in for ``LatteTransformer3DModel``: frames of any size, as many as it was trained on, or one."""

    stock = LatteTransformer3DModel

    @NOT_COMPILED
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict noise and variance of latents (B, C, F, H, W) at one t, with text (B, T, J): (B, 2 C, F, H, W).

        On the ``capacity`` and ``dynamic`` token paths there is room for the tokens of the size that was built for, and
        no engine for fewer. Raises ``EngineMismatchError`` for inputs this bundle was not built for.
        """
        if timestep is None or encoder_hidden_states is None:
            raise EngineMismatchError("timestep and encoder_hidden_states are required")
        check_absent(
            {"encoder_attention_mask": encoder_attention_mask}, "cut the text to its length, as LattePipeline does"
        )
        if not enable_temporal_attentions:
            raise EngineMismatchError("enable_temporal_attentions=False would leave blocks out; they are built in")
        latents = floating("hidden_states", hidden_states, "batch", "channels", "frames", "height", "width")
        self._check_size(*latents.shape[2:])
        text = floating("encoder_hidden_states", encoder_hidden_states, "batch", "tokens", "channels")
        sample = self.denoise(timestep, {"hidden_states": latents, "encoder_hidden_states": text}, {})
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_size(self, frames: int, height: int, width: int) -> None:
        trained, patch = self.config.video_length, self.config.patch_size
        if height % patch or width % patch:
            raise EngineMismatchError(
                f"latents are {height} x {width}; both must be multiples of {patch}, the patch size"
            )
        if frames not in (1, trained):
            raise EngineMismatchError(
                f"{self.spec.name} knows the places of {trained} frames, or of one, not of {frames}"
            )

    def cache_context(self, name: str, **context: Any) -> AbstractContextManager[None]:
        """Return an empty context: pipelines enter one around each call, and a bundle has no activation caches."""
        return nullcontext()

    @classmethod
    def example_inputs(cls, spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
        noise = random_rows(batch, seed)
        latents = noise(*spec.latent_shape)  # (B, C, F, H, W)
        text = noise(spec.text_tokens, spec.config["caption_channels"])  # (B, T, J)
        return {"hidden_states": latents, "timestep": torch.full((batch,), t), "encoder_hidden_states": text}


# The name that saved pipelines and pickles refer to. It is public, and outlives the folders of this package.
LatteBundle.__module__ = "dyexport"
StandIn = LatteBundle
