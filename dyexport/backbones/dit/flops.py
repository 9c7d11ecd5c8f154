"""FLOPs of DiT."""

from __future__ import annotations

import numpy as np

from dyexport.backbones.base import channels_of
from dyexport.flops import Config, FlopsModel, RouterFlops


def count(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """Count DiT blocks: attention 4 C^2 N + 2 N^2 C, MLP 8 C^2 N (arXiv 2410.03456 section 3.5)."""
    channels = channels_of(config)
    patch = config["patch_size"] ** 2
    embedders = 256 * channels + channels**2
    modulation = 6 * channels**2 * config["num_layers"] + 2 * channels**2
    pixels = tokens * channels * patch * (config["in_channels"] + config["out_channels"])
    blocks = np.ones(config["num_layers"])
    return FlopsModel(
        attention=(4 * channels**2 * tokens + 2 * tokens**2 * channels) * blocks,
        attention_tokens=0 * blocks,
        mlp=0 * blocks,
        mlp_tokens=8 * channels**2 * tokens * blocks,
        routers={"published": RouterFlops(0 * blocks, tokens * (channels + 1) * (channels // 16) * blocks)},
        low_rank=18 * channels * tokens * blocks,
        static=float(embedders + modulation + pixels),
        conditioning=float(embedders + modulation),
    )
