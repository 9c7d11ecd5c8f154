"""FLOPs of Qwen-Image."""

from __future__ import annotations

import numpy as np

from dyexport.backbones.base import channels_of
from dyexport.flops import Config, FlopsModel, RouterFlops


def count(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """Count double blocks, with attention over image and text together; skipped image tokens miss their MLP.

    Nothing reads the text after the last block: its projection and MLP there are computed by diffusers, and not
    counted.
    """
    channels, depth = channels_of(config), config["num_layers"]
    rows, bottleneck, blocks = tokens + text_tokens, channels // 16, np.ones(depth)
    text = text_tokens * np.append(blocks[1:], 0)  # (L,) tokens of text that are updated
    embedders = channels * (tokens * config["in_channels"] + text_tokens * config["joint_attention_dim"])
    conditioning = (256 + channels) * channels + (12 * depth + 2) * channels**2  # timestep, modulation
    return FlopsModel(
        attention=(3 * channels * rows + 2 * rows**2 + channels * tokens) * channels * blocks + channels**2 * text,
        attention_tokens=0 * blocks,
        mlp=8 * channels**2 * text,
        mlp_tokens=8 * channels**2 * tokens * blocks,
        routers={"compact": RouterFlops(0 * blocks, tokens * (channels + 1) * bottleneck * blocks)},
        low_rank=channels * ((18 * tokens + 6 * text_tokens) * blocks + 12 * text),
        static=float(embedders + conditioning + tokens * channels * config["in_channels"]),
        conditioning=float(conditioning),
    )
