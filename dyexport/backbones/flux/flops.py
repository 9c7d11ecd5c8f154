"""FLOPs of FLUX."""

from __future__ import annotations

import numpy as np

from dyexport.backbones.base import channels_of
from dyexport.flops import Config, FlopsModel, RouterFlops


def count(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """Count FLUX blocks: attention over image and text together; skipped image tokens miss the MLP.

    A single block has one output projection for attention and MLP, so skipped tokens miss their rows of it too.
    """
    channels = channels_of(config)
    rows, blocks = tokens + text_tokens, np.ones(config["num_layers"] + config["num_single_layers"])
    double = np.repeat([1.0, 0.0], [config["num_layers"], config["num_single_layers"]])  # (L,)
    single = 1 - double
    mixing = 3 * channels**2 * rows + 2 * rows**2 * channels  # query, key, value, scores, their product
    return FlopsModel(
        attention=mixing + channels**2 * (rows * double + text_tokens * single),
        attention_tokens=channels**2 * tokens * single,
        mlp=8 * channels**2 * text_tokens * (double + single),
        mlp_tokens=8 * channels**2 * tokens * (double + single),
        routers={
            "published": RouterFlops(4 * channels**2 * blocks, channels * tokens * blocks),
            "compact": RouterFlops(0 * blocks, tokens * (channels + 1) * (channels // 16) * blocks),
        },
        low_rank=18 * channels * rows * (double + single),
        static=_embedders(config, channels, tokens, text_tokens) + _conditioning(config, channels),
        conditioning=_conditioning(config, channels),
    )


def _embedders(config: Config, channels: int, tokens: int, text_tokens: int) -> float:
    """Count the embedders of tokens and the final layer."""
    latents = tokens * channels * (config["in_channels"] + (config.get("out_channels") or config["in_channels"]))
    return float(latents + text_tokens * channels * config["joint_attention_dim"])


def _conditioning(config: Config, channels: int) -> float:
    """Count the embedders of timestep, guidance and pooled text, and the modulation."""
    sinusoidal = 2 if config["guidance_embeds"] else 1  # timestep, and guidance
    vectors = sinusoidal * (256 * channels + channels**2) + config["pooled_projection_dim"] * channels + channels**2
    modulation = (12 * config["num_layers"] + 3 * config["num_single_layers"] + 2) * channels**2
    return float(vectors + modulation)
