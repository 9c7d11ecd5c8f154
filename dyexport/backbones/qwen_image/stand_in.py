"""Stand-in for diffusers' ``QwenImageTransformer2DModel``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import isqrt
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.bundle.spec import ModelSpec
from dyexport.errors import EngineMismatchError
from dyexport.runtime.inputs import check_absent, check_attention_kwargs, described, floating
from dyexport.runtime.stock import random_rows
from dyexport.runtime.transformer import NOT_COMPILED, BundleTransformer


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
        img_shapes: Any = None,
        guidance: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        additional_t_cond: Any = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity of packed latents (B, N, C) at one sigma, with text (B, T, J): (B, N, C).

        The mask (B, T) is 0 where the text is padding. ``img_shapes`` holds (frames, rows, columns) of the tokens of
        each sample, which all samples share; a tensor of the three stands for all. Raises ``EngineMismatchError`` for
        inputs this bundle was not built for.
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
        sample = self.denoise(timestep, inputs, {}, {"img_shapes": _checked_shapes(img_shapes, latents)})
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def cache_context(self, name: str, **context: Any) -> AbstractContextManager[None]:
        """Do nothing: pipelines open a context around each call for caches of activations, and there are none."""
        return nullcontext()

    @classmethod
    def example_inputs(cls, spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
        noise, config = random_rows(batch, seed), spec.config
        rows = next(rows for rows in range(isqrt(spec.tokens), 0, -1) if spec.tokens % rows == 0)
        return {
            "hidden_states": noise(spec.tokens, config["in_channels"]),  # (B, N, C)
            "encoder_hidden_states": noise(spec.text_tokens, config["joint_attention_dim"]),  # (B, T, J)
            "timestep": torch.full((batch,), t),
            "img_shapes": torch.tensor([1, rows, spec.tokens // rows]),
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


def _checked_shapes(img_shapes: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return frames, rows and columns of every sample: (3,). Raises ``EngineMismatchError``."""
    samples = [img_shapes] if isinstance(img_shapes, torch.Tensor) else img_shapes
    try:
        shapes = torch.tensor([_one_picture(sample) for sample in samples], device="cpu")  # (B, 3)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EngineMismatchError(
            f"img_shapes is {described(img_shapes)}; give (frames, rows, columns) for each sample"
        ) from error
    if bool((shapes != shapes[:1]).any()):
        raise EngineMismatchError("img_shapes differ between the samples of a batch; call once for each size")
    if int(shapes[0].prod()) != latents.shape[1]:
        raise EngineMismatchError(
            f"img_shapes is {shapes[0].tolist()}, but hidden_states has {latents.shape[1]} tokens"
        )
    return shapes[0]


def _one_picture(sample: Any) -> tuple[int, int, int]:
    """Return the shape of a sample's one picture, which diffusers' pipelines put into a list."""
    if isinstance(sample, list) and len(sample) > 1 and not isinstance(sample[0], int):
        raise EngineMismatchError(
            f"img_shapes holds {len(sample)} pictures for a sample; use the diffusers transformer to edit or layer them"
        )
    frames, rows, columns = sample[0] if isinstance(sample, list) and len(sample) == 1 else sample
    return int(frames), int(rows), int(columns)


# The name that saved pipelines and pickles refer to. It is public, and outlives the folders of this package.
QwenImageBundle.__module__ = "dyexport"
StandIn = QwenImageBundle
