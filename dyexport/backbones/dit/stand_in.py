"""Stand-in for diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.bundle.spec import ModelSpec
from dyexport.errors import BundleError, EngineMismatchError
from dyexport.runtime.inputs import check_attention_kwargs, described, floating
from dyexport.runtime.stock import random_rows
from dyexport.runtime.transformer import NOT_COMPILED, BundleTransformer

PIPELINE_NULL_CLASS = 1000  # "no class" of diffusers' DiTPipeline, however many classes the model has


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
    def check_spec(cls, spec: ModelSpec) -> None:
        configured = spec.config.get("num_embeds_ada_norm", spec.classes)
        if configured != spec.classes:
            raise BundleError(
                f"{spec.name} has {spec.classes} classes and {configured!r} in its configuration; build it again"
            )

    @classmethod
    def example_inputs(cls, spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
        noise = random_rows(batch, seed)
        labels = (torch.arange(batch) + seed) % spec.classes  # (B,)
        return {"hidden_states": noise(*spec.latent_shape), "timestep": torch.full((batch,), t), "class_labels": labels}


def checked_labels(value: Any, classes: int) -> torch.Tensor:
    """Return labels (1,) or (B,), int64 on the CPU; ``classes`` stands for no class.

    Raises ``EngineMismatchError`` for labels outside the embedding's ``classes`` + 1 rows: torch would count a negative
    label from the end, and round a fraction.
    """
    known = f"whole numbers from 0 to {classes - 1}, or {classes} for none, are what the conditioning was built for"
    whole = isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)
    if not whole or value.ndim > 1 or not value.numel():
        raise EngineMismatchError(f"class_labels is {described(value)}; an int64 tensor (batch,) of {known}")
    labels = value.reshape(-1).tolist()  # (B,)
    if classes < PIPELINE_NULL_CLASS:
        labels = [classes if label == PIPELINE_NULL_CLASS else label for label in labels]
    if wrong := [label for label in labels if not 0 <= label <= classes]:
        raise EngineMismatchError(f"class_labels holds {wrong[0]}; {known}")
    return torch.tensor(labels, dtype=torch.int64, device="cpu")


# The name that saved pipelines and pickles refer to. It is public, and outlives the folders of this package.
DiTBundle.__module__ = "dyexport"
StandIn = DiTBundle
