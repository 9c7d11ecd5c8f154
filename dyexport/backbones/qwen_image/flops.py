"""FLOPs of Qwen-Image."""

from __future__ import annotations

import numpy as np

from dyexport.backbones.base import channels_of
from dyexport.flops import Config, FlopsModel


def count(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """Count double blocks, with attention over image and text together; skipped image tokens miss their MLP."""
    channels, depth = channels_of(config), config["num_layers"]
    rows, bottleneck, blocks = tokens + text_tokens, channels // 16, np.ones(depth)
    embedders = (256 + channels) * channels  # timestep
    embedders += channels * (tokens * config["in_channels"] + text_tokens * config["joint_attention_dim"])
    modulation = (12 * depth + 2) * channels**2
    return FlopsModel(
        attention=(4 * channels**2 * rows + 2 * rows**2 * channels) * blocks,
        attention_tokens=0 * blocks,
        mlp=8 * channels**2 * text_tokens * blocks,
        mlp_tokens=8 * channels**2 * tokens * blocks,
        router=tokens * (channels + 1) * bottleneck * blocks,
        low_rank=18 * channels * rows * blocks,
        static=float(embedders + modulation + tokens * channels * config["in_channels"]),
    )
