"""FLOPs of a backbone as a function of its widths and tokens. Counts multiply-adds, per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyexport.architectures import Preset
from dyexport.errors import UsageError
from dyexport.manifest import ModelSpec

Array = Any  # numpy array or torch tensor: every method is plain arithmetic
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FlopsModel:
    """Costs of one sample, in multiply-adds (the paper's GFLOPs, DiT table 1), block by block: (L,) each.

    With the shares of heads, MLP groups and tokens kept in a block, it costs
    ``heads * (attention + tokens * attention_tokens) + groups * (mlp + tokens * mlp_tokens)``:
    ``attention`` and ``mlp`` are what skipped tokens do not save, text for one. ``router`` is a
    block's token router. ``static`` is what no gate touches in the whole network: embedders, adaLN
    modulation, the final layer.
    """

    attention: np.ndarray
    attention_tokens: np.ndarray
    mlp: np.ndarray
    mlp_tokens: np.ndarray
    router: np.ndarray
    static: float

    @classmethod
    def of(cls, backbone: str, config: Config, *, tokens: int, text_tokens: int = 0) -> FlopsModel:
        """Costs of a stock diffusers configuration; ``tokens`` are those that a router may skip."""
        if backbone not in _COUNTS:
            raise UsageError(f"no FLOPs of backbone {backbone!r}; known: {', '.join(_COUNTS)}")
        return _COUNTS[backbone](config, tokens, text_tokens)

    @classmethod
    def of_preset(cls, preset: Preset) -> FlopsModel:
        config = preset.transformer_config()
        return cls.of(preset.backbone, config, tokens=preset.tokens, text_tokens=preset.text_tokens)

    @property
    def depth(self) -> int:
        return len(self.mlp)

    @property
    def head_cost(self) -> np.ndarray:
        """All heads of each block, every token running: (L,)."""
        return self.attention + self.attention_tokens

    @property
    def group_cost(self) -> np.ndarray:
        """All MLP groups of each block, every token running: (L,)."""
        return self.mlp + self.mlp_tokens

    @property
    def gated(self) -> float:
        """Attention and MLP of all blocks at full width and with every token."""
        return float((self.head_cost + self.group_cost).sum())

    @property
    def dense(self) -> float:
        """The whole static network."""
        return self.gated + self.static

    def dynamic(self, heads: Array, groups: Array, tokens: Array) -> Array:
        """Attention and MLP cost from kept shares per block: 3 x (..., L) -> (...)."""
        costs = (
            heads * _like(heads, self.attention)
            + heads * tokens * _like(heads, self.attention_tokens)
            + groups * _like(heads, self.mlp)
            + groups * tokens * _like(heads, self.mlp_tokens)
        )
        return costs.sum(-1)

    def flops_ratio(self, heads: Array, groups: Array, tokens: Array) -> Array:
        """The paper's lambda: attention and MLP against dense, static layers left out (eq. 6)."""
        return self.dynamic(heads, groups, tokens) / self.gated

    def network_ratio(self, heads: Array, groups: Array, tokens: Array, *, routed: bool) -> Array:
        """The whole network against dense; where ``routed``, token routers run."""
        routers = float(self.router.sum()) if routed else 0.0
        return (self.dynamic(heads, groups, tokens) + self.static + routers) / self.dense


def low_rank_flops(spec: ModelSpec, depth: int) -> float:
    """What TD-LoRA's paths cost at full width with every token, at most: 18 C channels of linears in every block."""
    if spec.td_lora is None:
        return 0.0
    channels = spec.config["num_attention_heads"] * spec.config["attention_head_dim"]
    return 18.0 * channels * spec.td_lora.width * (spec.tokens + spec.text_tokens) * depth


def _like(shares: Array, costs: np.ndarray) -> Array:
    """Costs as the kind of array that shares are, on their device."""
    return shares.new_tensor(costs) if hasattr(shares, "new_tensor") else costs


def _count_dit(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """DiT blocks: attention 4 C^2 N + 2 N^2 C, MLP 8 C^2 N (arXiv 2410.03456 section 3.5)."""
    channels = config["num_attention_heads"] * config["attention_head_dim"]
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
        router=tokens * (channels * (channels // 16) + channels // 16) * blocks,
        static=embedders + modulation + pixels,
    )


def _count_flux(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """FLUX blocks, attention over image and text together; skipped image tokens miss the MLP.

    A single block has one projection for attention and MLP, so there they miss their row of it too.
    """
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    rows = tokens + text_tokens
    double = np.repeat([1.0, 0.0], [config["num_layers"], config["num_single_layers"]])  # (L,)
    single = 1 - double
    mixing = 3 * channels**2 * rows + 2 * rows**2 * channels  # query, key, value, scores, their product
    return FlopsModel(
        attention=mixing + channels**2 * (rows * double + text_tokens * single),
        attention_tokens=channels**2 * tokens * single,
        mlp=8 * channels**2 * text_tokens * (double + single),
        mlp_tokens=8 * channels**2 * tokens * (double + single),
        router=(4 * channels**2 + channels * tokens) * (double + single),
        static=_flux_static(config, channels, tokens, text_tokens),
    )


def _flux_static(config: Config, channels: int, tokens: int, text_tokens: int) -> float:
    """Embedders, modulation, final layer."""
    sinusoidal = 2 if config["guidance_embeds"] else 1  # timestep, and guidance
    vectors = sinusoidal * (256 * channels + channels**2) + config["pooled_projection_dim"] * channels + channels**2
    latents = tokens * channels * config["in_channels"]
    text = text_tokens * channels * config["joint_attention_dim"]
    modulation = (12 * config["num_layers"] + 3 * config["num_single_layers"] + 2) * channels**2
    return float(vectors + 2 * latents + text + modulation)


def _count_latte(config: Config, tokens: int, text_tokens: int) -> FlopsModel:
    """DiT blocks, every frame by itself and every patch by itself in turn. ``tokens`` are those of all frames.

    Attention to the text is static: no gate touches it. Its keys and values are counted once a sample; the
    stock module makes them anew for each frame.
    """
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    frames, pairs = config["video_length"], config["num_layers"]
    row = np.tile([tokens // frames, frames], pairs)  # (L,), tokens that attend to each other
    blocks = np.ones(2 * pairs)
    pixels = tokens * channels * config["patch_size"] ** 2 * (config["in_channels"] + config["out_channels"])
    embedders = (256 + 7 * channels) * channels + text_tokens * channels * (config["caption_channels"] + channels)
    to_text = 2 * channels**2 * (tokens + text_tokens) + 2 * tokens * text_tokens * channels
    return FlopsModel(
        attention=4.0 * channels**2 * tokens + 2.0 * row * tokens * channels,
        attention_tokens=0 * blocks,
        mlp=0 * blocks,
        mlp_tokens=8 * channels**2 * tokens * blocks,
        router=tokens * (channels * (channels // 16) + channels // 16) * blocks,
        static=float(pixels + embedders + pairs * to_text),
    )


_COUNTS: dict[str, Callable[[Config, int, int], FlopsModel]] = {
    "dit": _count_dit,
    "sit": _count_dit,
    "flux": _count_flux,
    "latte": _count_latte,
}
