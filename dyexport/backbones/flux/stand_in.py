"""Stand-in for diffusers' ``FluxTransformer2DModel``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.bundle.spec import ModelSpec
from dyexport.errors import EngineMismatchError
from dyexport.runtime.inputs import check_absent, check_attention_kwargs, described, float_values, floating
from dyexport.runtime.stock import random_rows
from dyexport.runtime.transformer import NOT_COMPILED, BundleTransformer

LARGEST_GUIDANCE = 1e35  # it is embedded as a thousand times itself, in fp32


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

        Positions are (N, 3) and (T, 3), guidance is a number or (B,). Raises ``EngineMismatchError`` for inputs this
        bundle was not built for.
        """
        if timestep is None:
            raise EngineMismatchError("timestep is required")
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
            raise EngineMismatchError(f"{self.spec.name} takes a guidance scale, such as 3.5; give guidance")
        if not self.config.guidance_embeds:
            check_absent({"guidance": guidance}, f"{self.spec.name} takes none")
        sample = self.denoise(timestep, inputs, conditions, positions(txt_ids, img_ids))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def cache_context(self, name: str, **context: Any) -> AbstractContextManager[None]:
        """Return an empty context: pipelines enter one around each call, and a bundle has no activation caches."""
        return nullcontext()

    @classmethod
    def example_inputs(cls, spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
        noise, config = random_rows(batch, seed), spec.config
        inputs = {
            "hidden_states": noise(spec.tokens, config["in_channels"]),  # (B, N, C)
            "encoder_hidden_states": noise(spec.text_tokens, config["joint_attention_dim"]),  # (B, T, J)
            "pooled_projections": noise(config["pooled_projection_dim"]),  # (B, P)
            "timestep": torch.full((batch,), t),
            "img_ids": torch.zeros(spec.tokens, 3),
            "txt_ids": torch.zeros(spec.text_tokens, 3),
        }
        return {**inputs, "guidance": torch.full((batch,), 3.5)} if config["guidance_embeds"] else inputs


def guidance_scale(value: Any) -> torch.Tensor:
    """Return a guidance scale, or one per sample: (1,) or (B,), float32 on the CPU. Raises ``EngineMismatchError``."""
    values = float_values("guidance", value)
    if wrong := [number for number in values if abs(number) > LARGEST_GUIDANCE]:
        raise EngineMismatchError(f"guidance is {wrong[0]:g}, which overflows when it is embedded; give such as 3.5")
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def positions(txt_ids: Any, img_ids: Any) -> dict[str, torch.Tensor]:
    """Return positions (T, 3) and (N, 3) in fp32, rounded as the stock module does, which concatenates them.

    Positions with a batch (B, N, 3), as the published code has them, are equal for all samples.
    """
    by_name = {"txt_ids": txt_ids, "img_ids": img_ids}
    for name, ids in by_name.items():
        if not isinstance(ids, torch.Tensor) or ids.is_complex() or ids.ndim not in (2, 3) or not ids.numel():
            raise EngineMismatchError(f"{name} must be a tensor (tokens, 3) of numbers, is {described(ids)}")
    common = torch.promote_types(txt_ids.dtype, img_ids.dtype)
    return {name: (ids[0] if ids.ndim == 3 else ids).to(common).to(torch.float32) for name, ids in by_name.items()}


# The name that saved pipelines and pickles refer to. It is public, and outlives the folders of this package.
FluxBundle.__module__ = "dyexport"
StandIn = FluxBundle
