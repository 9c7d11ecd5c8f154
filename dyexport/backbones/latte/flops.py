"""FLOPs of Latte."""

from __future__ import annotations

import numpy as np

from dyexport.backbones.base import channels_of
from dyexport.flops import Config, FlopsModel, RouterFlops


def count(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """Count DiT blocks that attend within each frame and along each patch in turn. ``tokens`` are of all frames.

    Attention to the text is static: no gate touches it. Its keys and values are counted once per sample; the
    stock module computes them again for each frame.
    """
    channels = channels_of(config)
    frames, pairs = config["video_length"], config["num_layers"]
    row = np.tile([tokens // frames, frames], pairs)  # (L,), tokens that attend to each other
    blocks = np.ones(2 * pairs)
    pixels = tokens * channels * config["patch_size"] ** 2 * (config["in_channels"] + config["out_channels"])
    conditioning = (256 + 7 * channels) * channels  # timestep, and the modulation that blocks share
    captions = text_tokens * channels * (config["caption_channels"] + channels)
    to_text = 2 * channels**2 * (tokens + text_tokens) + 2 * tokens * text_tokens * channels
    return FlopsModel(
        attention=4.0 * channels**2 * tokens + 2.0 * row * tokens * channels,
        attention_tokens=0 * blocks,
        mlp=0 * blocks,
        mlp_tokens=8 * channels**2 * tokens * blocks,
        routers={"published": RouterFlops(0 * blocks, tokens * (channels + 1) * (channels // 16) * blocks)},
        low_rank=18 * channels * tokens * blocks,
        static=float(pixels + captions + conditioning + pairs * to_text),
        conditioning=float(conditioning),
    )
