"""FLOPs of a backbone as a function of its widths and tokens. Counts multiply-adds, per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dyexport.backbones import part
from dyexport.backbones.base import Preset
from dyexport.lora import LoraSpec

if TYPE_CHECKING:
    from dyexport.bundle.spec import ModelSpec, TokenRouterKind

Array = Any  # numpy array or torch tensor: every method is plain arithmetic
Config = Mapping[str, Any]


class RouterFlops(NamedTuple):
    """Cost of each block's token router, in multiply-adds: (L,) each.

    ``conditioning`` is computed by the conditioning network, for each timestep and condition, and ``tokens`` at each
    step, from tokens.
    """

    conditioning: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, kw_only=True)
class FlopsModel:
    """Costs of one sample, in multiply-adds (the paper's GFLOPs, DiT table 1), block by block: (L,) each.

    With the shares of heads, MLP groups and tokens kept in a block, it costs
    ``heads * (attention + tokens * attention_tokens) + groups * (mlp + tokens * mlp_tokens)``:
    ``attention`` and ``mlp`` are costs that skipped tokens do not save, such as text. ``routers`` are token routers
    by kind, oldest first, and ``token_router`` the kind that runs; None: the oldest. ``low_rank`` are a block's TD-LoRA
    paths at full width with every token, per channel of ``LoraSpec.width``. ``static`` is the cost of the whole network
    that no gate touches: embedders, adaLN modulation, the final layer. ``conditioning`` is the share of it that the
    conditioning network computes, without token routers.
    """

    attention: np.ndarray
    attention_tokens: np.ndarray
    mlp: np.ndarray
    mlp_tokens: np.ndarray
    routers: Mapping[TokenRouterKind, RouterFlops]
    low_rank: np.ndarray
    static: float
    conditioning: float
    token_router: TokenRouterKind | None = None

    @classmethod
    def of(
        cls,
        backbone: str,
        config: Config,
        *,
        tokens: int,
        text_tokens: int = 0,
        token_router: TokenRouterKind | None = None,
    ) -> FlopsModel:
        """Count a stock diffusers configuration; ``tokens`` are those that a router may skip."""
        count: Callable[[Config, int, int], FlopsModel] = part(backbone, "flops").count
        return replace(count(config, tokens, text_tokens), token_router=token_router)

    @classmethod
    def of_spec(cls, spec: ModelSpec) -> FlopsModel:
        """Count a bundle's model."""
        sizes = {"tokens": spec.tokens, "text_tokens": spec.text_tokens}
        return cls.of(spec.backbone, spec.config, **sizes, token_router=spec.token_router)

    @classmethod
    def of_preset(cls, preset: Preset, token_router: TokenRouterKind | None = None) -> FlopsModel:
        """Count a preset's model; ``token_router`` defaults to the kind of new models."""
        return cls.of(
            preset.backbone,
            preset.transformer_config(),
            tokens=preset.tokens,
            text_tokens=preset.text_tokens,
            token_router=token_router or preset.token_routers[-1],
        )

    @property
    def depth(self) -> int:
        return len(self.mlp)

    @property
    def head_cost(self) -> np.ndarray:
        """Return the cost of all heads of each block, every token running: (L,)."""
        return self.attention + self.attention_tokens

    @property
    def group_cost(self) -> np.ndarray:
        """Return the cost of all MLP groups of each block, every token running: (L,)."""
        return self.mlp + self.mlp_tokens

    @property
    def router(self) -> np.ndarray:
        """Return the cost of each block's token router: (L,)."""
        return self._routers.conditioning + self._routers.tokens

    @property
    def routed_conditioning(self) -> float:
        """Return the cost of the conditioning network with what token routers take there."""
        return self.conditioning + float(self._routers.conditioning.sum())

    @property
    def _routers(self) -> RouterFlops:
        oldest: TokenRouterKind = next(iter(self.routers))
        return self.routers[self.token_router or oldest]

    @property
    def gated(self) -> float:
        """Return the cost of attention and MLP of all blocks at full width and with every token."""
        return float((self.head_cost + self.group_cost).sum())

    @property
    def dense(self) -> float:
        """Return the cost of the whole static network."""
        return self.gated + self.static

    def dynamic(self, heads: Array, groups: Array, tokens: Array) -> Array:
        """Compute the cost of attention and MLP from kept shares per block: 3 x (..., L) -> (...)."""
        costs = (
            heads * _like(heads, self.attention)
            + heads * tokens * _like(heads, self.attention_tokens)
            + groups * _like(heads, self.mlp)
            + groups * tokens * _like(heads, self.mlp_tokens)
        )
        return costs.sum(-1)

    def flops_ratio(self, heads: Array, groups: Array, tokens: Array) -> Array:
        """Return the paper's lambda: attention and MLP against dense, static layers left out (eq. 6)."""
        return self.dynamic(heads, groups, tokens) / self.gated

    def network_ratio(self, heads: Array, groups: Array, tokens: Array, *, routed: bool) -> Array:
        """Return the cost of the whole network over the dense one's; where ``routed``, token routers run."""
        routers = float(self.router.sum()) if routed else 0.0
        return (self.dynamic(heads, groups, tokens) + self.static + routers) / self.dense

    def low_rank_ratio(self, td_lora: LoraSpec | None) -> float:
        """Return the cost of TD-LoRA's paths over the dense network's, at most: at full width with every token."""
        return 0.0 if td_lora is None else float(self.low_rank.sum()) * td_lora.width / self.dense


def _like(shares: Array, costs: np.ndarray) -> Array:
    """Return costs as the same kind of array as shares, on their device."""
    return shares.new_tensor(costs) if hasattr(shares, "new_tensor") else costs
