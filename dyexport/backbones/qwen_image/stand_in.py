"""Stand-in for diffusers' ``QwenImageTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import isqrt, prod
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.backbones.qwen_image.positions import Shape, first_shapes, token_positions
from dyexport.bundle.manifest import ModelSpec
from dyexport.errors import EngineMismatchError
from dyexport.runtime.inputs import check_absent, check_attention_kwargs, described, floating
from dyexport.runtime.transformer import NOT_COMPILED, BundleTransformer, random_rows


class QwenImageBundle(BundleTransformer, QwenImageTransformer2DModel):
    """Stands in for ``QwenImageTransformer2DModel``: any resolution, any length of text, padded or not."""

    stock = QwenImageTransformer2DModel

    @NOT_COMPILED
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | float | None = None,
        img_shapes: Sequence[Any] | None = None,
        guidance: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        additional_t_cond: Any = None,
        return_dict: bool = True,
        *,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity of packed latents (B, N, C) at one sigma, with text (B, T, J): (B, N, C).

        The mask (B, T) is 0 where the text is padding. ``img_shapes`` holds (frames, rows, columns) of tokens, or a
        list of them, for each sample; all samples have the same. Positions, ``img_ids`` (N, 3) and ``txt_ids`` (T, 3),
        may be given instead. Raises ``EngineMismatchError`` for inputs this bundle was not built for.
        """
        if timestep is None:
            raise EngineMismatchError("timestep is required")
        check_attention_kwargs("attention_kwargs", attention_kwargs)
        check_absent(
            {"controlnet_block_samples": controlnet_block_samples}, "use the diffusers transformer with a ControlNet"
        )
        check_absent({"additional_t_cond": additional_t_cond}, "use the diffusers transformer for layered pictures")
        check_absent({"guidance": guidance}, f"{self.spec.name} takes none; give true_cfg_scale to the pipeline")
        latents = floating("hidden_states", hidden_states, "batch", "tokens", "channels")
        text = floating("encoder_hidden_states", encoder_hidden_states, "batch", "tokens", "channels")
        inputs = {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": _mask(encoder_hidden_states_mask, text),
        }
        if img_shapes is not None:
            img_ids, txt_ids = token_positions(_checked_shapes(img_shapes, latents), text.shape[1], latents.device)
        positions = {
            "img_ids": floating("img_ids", img_ids, "tokens", "axes"),
            "txt_ids": floating("txt_ids", txt_ids, "tokens", "axes"),
        }
        sample = self.denoise(timestep, inputs, {}, positions)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def cache_context(self, name: str, **context: Any) -> AbstractContextManager[None]:
        """Do nothing: pipelines open a context around each call for caches of activations, and there are none."""
        return nullcontext()

    @classmethod
    def example_inputs(cls, spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, Any]:
        noise, config = random_rows(batch, seed), spec.config
        rows = next(rows for rows in range(isqrt(spec.tokens), 0, -1) if spec.tokens % rows == 0)
        return {
            "hidden_states": noise(spec.tokens, config["in_channels"]),  # (B, N, C)
            "encoder_hidden_states": noise(spec.text_tokens, config["joint_attention_dim"]),  # (B, T, J)
            "timestep": torch.full((batch,), t),
            "img_shapes": [[(1, rows, spec.tokens // rows)]] * batch,
        }


def _mask(mask: Any, text: torch.Tensor) -> torch.Tensor:
    """Return the mask of text (B, T, J) as 1 and 0: (B, T) float32. Any number but 0 is a token, as in diffusers."""
    if mask is None:
        return torch.ones(text.shape[:2], device=text.device)
    if not isinstance(mask, torch.Tensor) or mask.shape != text.shape[:2]:
        raise EngineMismatchError(
            f"encoder_hidden_states_mask must be a tensor {list(text.shape[:2])}, as the text, is {described(mask)}"
        )
    return mask.to(torch.bool).float()


def _checked_shapes(img_shapes: Any, latents: torch.Tensor) -> tuple[Shape, ...]:
    """Return the shapes that all samples have. Raises ``EngineMismatchError`` unless they are those of latents."""
    try:
        samples = [first_shapes([sample]) for sample in img_shapes]
        shapes: tuple[Shape, ...] = samples[0]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise EngineMismatchError(
            f"img_shapes is {described(img_shapes)}; give (frames, rows, columns), or a list of them, for each sample"
        ) from error
    if any(sample != shapes for sample in samples):
        raise EngineMismatchError("img_shapes differ between the samples of a batch; call once for each size")
    if sum(map(prod, shapes)) != latents.shape[1]:
        raise EngineMismatchError(f"img_shapes is {list(shapes)}, but hidden_states has {latents.shape[1]} tokens")
    return shapes


# The name that saved pipelines and pickles refer to. It is public, and outlives the folders of this package.
QwenImageBundle.__module__ = "dyexport"
StandIn = QwenImageBundle
