"""Bundles with the ``forward`` of the diffusers transformer they stand in for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.errors import EngineMismatch
from dyexport.manifest import ModelSpec
from dyexport.runtime.component import BundleTransformer
from dyexport.runtime.inputs import (
    check_absent,
    check_attention_kwargs,
    checked_labels,
    floating,
    guidance_scale,
    positions,
)

# Dynamo would find nothing to compile, and recompile for each clock reading. diffusers has imported it already.
NOT_COMPILED = torch.compiler.disable(reason="the layers of a bundle are inside engines")


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

        Raises ``EngineMismatch`` for inputs this bundle was not built for.
        """
        if timestep is None or class_labels is None:
            raise EngineMismatch(f"timestep and class_labels are required; label {self.spec.classes} means no class")
        check_attention_kwargs("cross_attention_kwargs", cross_attention_kwargs)
        labels = checked_labels(class_labels, self.spec.classes)  # (B,)
        latents = floating("hidden_states", hidden_states, "batch", "channels", "height", "width")
        sample = self.denoise(timestep, {"hidden_states": latents}, {"class_labels": labels})
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class FluxBundle(BundleTransformer, FluxTransformer2DModel):
    """Stands in for ``FluxTransformer2DModel``: any resolution, any length of text."""

    stock = FluxTransformer2DModel

    @NOT_COMPILED
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | float | None = None,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | float | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity of packed latents (B, N, C) at one sigma, with text (B, T, J), pooled (B, P): (B, N, C).

        Positions are (N, 3) and (T, 3), guidance is a number or (B,). Raises ``EngineMismatch`` for inputs this
        bundle was not built for.
        """
        if timestep is None:
            raise EngineMismatch("timestep is required")
        check_attention_kwargs("joint_attention_kwargs", joint_attention_kwargs)
        control = {
            "controlnet_block_samples": controlnet_block_samples,
            "controlnet_single_block_samples": controlnet_single_block_samples,
            "controlnet_blocks_repeat": controlnet_blocks_repeat,
        }
        check_absent(control, "use the diffusers transformer with a ControlNet")
        inputs = {
            "hidden_states": floating("hidden_states", hidden_states, "batch", "tokens", "channels"),
            "encoder_hidden_states": floating(
                "encoder_hidden_states", encoder_hidden_states, "batch", "tokens", "channels"
            ),
        }
        conditions = {"pooled_projections": floating("pooled_projections", pooled_projections, "batch", "channels")}
        if guidance is not None:
            conditions["guidance"] = guidance_scale(guidance)  # (B,)
        if self.config.guidance_embeds and guidance is None:
            raise EngineMismatch(f"{self.spec.name} takes a guidance scale, such as 3.5; give guidance")
        if not self.config.guidance_embeds:
            check_absent({"guidance": guidance}, f"{self.spec.name} takes none")
        sample = self.denoise(timestep, inputs, conditions, positions(txt_ids, img_ids))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def cache_context(self, name: str, **context: Any) -> AbstractContextManager[None]:
        """Pipelines open one around each call, for caches that keep activations; there is none here."""
        return nullcontext()


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
        no engine for fewer. Raises ``EngineMismatch`` for inputs this bundle was not built for.
        """
        if timestep is None or encoder_hidden_states is None:
            raise EngineMismatch("timestep and encoder_hidden_states are required")
        check_absent(
            {"encoder_attention_mask": encoder_attention_mask}, "cut the text to its length, as LattePipeline does"
        )
        if not enable_temporal_attentions:
            raise EngineMismatch("enable_temporal_attentions=False would leave blocks out; they are built in")
        latents = floating("hidden_states", hidden_states, "batch", "channels", "frames", "height", "width")
        self._check_size(*latents.shape[2:])
        text = floating("encoder_hidden_states", encoder_hidden_states, "batch", "tokens", "channels")
        sample = self.denoise(timestep, {"hidden_states": latents, "encoder_hidden_states": text}, {})
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_size(self, frames: int, height: int, width: int) -> None:
        trained, patch = self.config.video_length, self.config.patch_size
        if height % patch or width % patch:
            raise EngineMismatch(f"latents are {height} x {width}; both must be multiples of {patch}, the patch size")
        if frames not in (1, trained):
            raise EngineMismatch(f"{self.spec.name} knows the places of {trained} frames, or of one, not of {frames}")

    def cache_context(self, name: str, **context: Any) -> AbstractContextManager[None]:
        """Pipelines open one around each call, for caches that keep activations; there is none here."""
        return nullcontext()


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
    stock = TRANSFORMERS[spec.backbone].stock
    assert stock is not None
    return stock(**spec.config).eval()


TRANSFORMERS: dict[str, type[BundleTransformer]] = {
    "dit": DiTBundle,
    "sit": DiTBundle,
    "flux": FluxBundle,
    "latte": LatteBundle,
}

for _bundle in (DiTBundle, FluxBundle, LatteBundle):
    # The name that saved pipelines and pickles refer to. It is public, and outlives the folders of this package.
    _bundle.__module__ = "dyexport"
