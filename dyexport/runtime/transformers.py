"""Bundles with the ``forward`` of the diffusers transformer they stand in for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.errors import EngineMismatch
from dyexport.manifest import ModelSpec
from dyexport.runtime.pipeline import BundleTransformer

DIT_PIPELINE_NULL_CLASS = 1000  # what diffusers' DiTPipeline gives as "no class", whatever the model's classes


class DiTBundle(BundleTransformer):
    """Stands in for ``DiTTransformer2DModel``."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the noise, or the velocity, of latents (B, C, H, W) with labels (B,) at one t: (B, C_out, H, W).

        ``cross_attention_kwargs`` has nothing to act on. Raises ``EngineMismatch`` for inputs this bundle
        was not built for.
        """
        if timestep is None or class_labels is None:
            raise EngineMismatch(f"timestep and class_labels are required; label {self.spec.classes} means no class")
        labels = class_labels.to(torch.int64)  # (B,)
        if self.spec.classes < DIT_PIPELINE_NULL_CLASS:
            labels = labels.masked_fill(labels == DIT_PIPELINE_NULL_CLASS, self.spec.classes)
        sample = self.denoise(timestep, {"hidden_states": hidden_states}, {"class_labels": labels})
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class FluxBundle(BundleTransformer):
    """Stands in for ``FluxTransformer2DModel``: any resolution, any length of text."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor | float,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity of packed latents (B, N, C) at one sigma, with text (B, T, J), pooled (B, P): (B, N, C).

        Positions are (N, 3) and (T, 3), guidance (B,) or (1,). Raises ``EngineMismatch`` for inputs this
        bundle was not built for.
        """
        if joint_attention_kwargs:
            raise EngineMismatch(
                f"joint_attention_kwargs {sorted(joint_attention_kwargs)} cannot reach inside an engine"
            )
        inputs = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "img_ids": _unbatched(img_ids),
            "txt_ids": _unbatched(txt_ids),
        }
        conditions = {"pooled_projections": pooled_projections}
        if self.config.guidance_embeds:
            if guidance is None:
                raise EngineMismatch(f"{self.spec.name} takes a guidance scale, such as 3.5; give guidance")
            conditions["guidance"] = guidance.expand(len(hidden_states))  # (B,)
        sample = self.denoise(timestep, inputs, conditions)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Pipelines open one around each call, for caches that keep activations; there is none here."""
        return nullcontext()


class LatteBundle(BundleTransformer):
    """Stands in for ``LatteTransformer3DModel``: frames of any size, as many as it was trained on, or one."""

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
        no engine for fewer. Raises ``EngineMismatch`` for inputs this bundle was not built for.
        """
        if timestep is None or encoder_hidden_states is None:
            raise EngineMismatch("timestep and encoder_hidden_states are required")
        if encoder_attention_mask is not None:
            raise EngineMismatch("encoder_attention_mask is not built in; cut the text to its length, as LattePipeline")
        if not enable_temporal_attentions:
            raise EngineMismatch("enable_temporal_attentions=False would leave blocks out; they are built in")
        frames, *sides = hidden_states.shape[2:]
        trained, patch = self.config.video_length, self.config.patch_size
        if any(side % patch for side in sides):
            raise EngineMismatch(
                f"latents are {sides[0]} x {sides[1]}; both must be multiples of {patch}, the patch size"
            )
        if frames not in (1, trained):
            raise EngineMismatch(f"{self.spec.name} knows the places of {trained} frames, or of one, not of {frames}")
        inputs = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
        sample = self.denoise(timestep, inputs, {})
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _unbatched(positions: torch.Tensor) -> torch.Tensor:
    """(N, 3) from that, or from one equal copy a sample (B, N, 3), as the published FLUX gives them."""
    return positions[0] if positions.ndim == 3 else positions


def example_inputs(spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise under random conditions, as the stock module's arguments; the same tensors for the same values."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    timestep, config = torch.full((batch,), t), spec.config  # (B,)
    if spec.backbone == "latte":
        text = noise(spec.text_tokens, config["caption_channels"])  # (B, T, J)
        return {"hidden_states": noise(*spec.latent_shape), "timestep": timestep, "encoder_hidden_states": text}
    if spec.backbone != "flux":
        labels = (torch.arange(batch) + seed) % spec.classes  # (B,)
        return {"hidden_states": noise(*spec.latent_shape), "timestep": timestep, "class_labels": labels}
    inputs = {
        "hidden_states": noise(spec.tokens, config["in_channels"]),  # (B, N, C)
        "encoder_hidden_states": noise(spec.text_tokens, config["joint_attention_dim"]),  # (B, T, J)
        "pooled_projections": noise(config["pooled_projection_dim"]),  # (B, P)
        "timestep": timestep,
        "img_ids": torch.zeros(spec.tokens, 3),
        "txt_ids": torch.zeros(spec.text_tokens, 3),
    }
    return {**inputs, "guidance": torch.full((batch,), 3.5)} if config["guidance_embeds"] else inputs


def stock_transformer(spec: ModelSpec) -> torch.nn.Module:
    """diffusers' own module at the bundle's size; its weights are random, which no time depends on."""
    from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel

    others: dict[str, Any] = {"flux": FluxTransformer2DModel, "latte": LatteTransformer3DModel}
    module: torch.nn.Module = others.get(spec.backbone, DiTTransformer2DModel)(**spec.config).eval()
    return module


TRANSFORMERS: dict[str, type[BundleTransformer]] = {
    "dit": DiTBundle,
    "sit": DiTBundle,
    "flux": FluxBundle,
    "latte": LatteBundle,
}
