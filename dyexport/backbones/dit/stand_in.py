"""Stand-in for diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.bundle.manifest import ModelSpec
from dyexport.errors import EngineMismatchError
from dyexport.runtime.inputs import (
    check_attention_kwargs,
    checked_labels,
    floating,
)
from dyexport.runtime.transformer import NOT_COMPILED, BundleTransformer, random_rows


class DiTBundle(BundleTransformer, DiTTransformer2DModel):
    """Stands in for ``DiTTransformer2DModel``."""

    stock = DiTTransformer2DModel

    @NOT_COMPILED
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the noise, or the velocity, of latents (B, C, H, W) with labels (B,) at one t: (B, C_out, H, W).

        Raises ``EngineMismatchError`` for inputs this bundle was not built for.
        """
        if timestep is None or class_labels is None:
            raise EngineMismatchError(
                f"timestep and class_labels are required; label {self.spec.classes} means no class"
            )
        check_attention_kwargs("cross_attention_kwargs", cross_attention_kwargs)
        labels = checked_labels(class_labels, self.spec.classes)  # (B,)
        latents = floating("hidden_states", hidden_states, "batch", "channels", "height", "width")
        sample = self.denoise(timestep, {"hidden_states": latents}, {"class_labels": labels})
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def example_inputs(cls, spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
        noise = random_rows(batch, seed)
        labels = (torch.arange(batch) + seed) % spec.classes  # (B,)
        return {"hidden_states": noise(*spec.latent_shape), "timestep": torch.full((batch,), t), "class_labels": labels}


# The name that saved pipelines and pickles refer to. It is public, and outlives the folders of this package.
DiTBundle.__module__ = "dyexport"
StandIn = DiTBundle
