"""FLOPs of a backbone as a function of its widths and tokens. Counts multiply-adds, per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Array = Any  # numpy array or torch tensor: every method is plain arithmetic


@dataclass(frozen=True, kw_only=True)
class FlopsModel:
    """Costs of one sample, in multiply-adds (the paper's GFLOPs, DiT table 1).

    ``attention`` and ``mlp`` are one block's, at full width and with every token; attention cost is
    proportional to the heads kept, MLP cost to groups x tokens. ``static`` is what no gate touches:
    embedders, adaLN modulation, the final layer. ``router`` is one block's token router.
    """

    depth: int
    attention: float
    mlp: float
    static: float
    router: float

    @classmethod
    def of_dit(cls, config: Mapping[str, Any]) -> FlopsModel:
        """DiT blocks: attention 4 C^2 N + 2 N^2 C, MLP 8 C^2 N (arXiv 2410.03456 section 3.5)."""
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        tokens = (config["sample_size"] // config["patch_size"]) ** 2
        patch = config["patch_size"] ** 2
        embedders = 256 * channels + channels**2
        modulation = 6 * channels**2 * config["num_layers"] + 2 * channels**2
        pixels = tokens * channels * patch * (config["in_channels"] + config["out_channels"])
        return cls(
            depth=config["num_layers"],
            attention=4 * channels**2 * tokens + 2 * tokens**2 * channels,
            mlp=8 * channels**2 * tokens,
            static=embedders + modulation + pixels,
            router=tokens * (channels * (channels // 16) + channels // 16),
        )

    @property
    def dense(self) -> float:
        """The whole static network."""
        return self.depth * (self.attention + self.mlp) + self.static

    def dynamic(self, heads: Array, mlp: Array) -> Array:
        """Attention and MLP cost from kept shares per block: (..., L), (..., L) -> (...)."""
        return (self.attention * heads + self.mlp * mlp).sum(-1)

    def flops_ratio(self, heads: Array, mlp: Array) -> Array:
        """The paper's lambda: attention and MLP against dense, static layers left out (eq. 6)."""
        return self.dynamic(heads, mlp) / (self.depth * (self.attention + self.mlp))

    def network_ratio(self, heads: Array, mlp: Array, *, routers: int) -> Array:
        """The whole network against dense, with ``routers`` token routers running."""
        return (self.dynamic(heads, mlp) + self.static + routers * self.router) / self.dense
