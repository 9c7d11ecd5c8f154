"""Count of tokens that routers kept beyond the capacity of their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """Overflow of token capacities since the bundle was loaded.

    routed   routings: steps x blocks x samples
    over     routings that kept more tokens than the block's capacity
    dropped  tokens beyond the capacity, in total
    """

    routed: int = 0
    over: int = 0
    dropped: int = 0

    @property
    def rate(self) -> float:
        """Share of routings over their capacity, in [0, 1]."""
        return self.over / self.routed if self.routed else 0.0


class OverflowCounter:
    """Sums on the device, which the host reads on request only."""

    def __init__(self) -> None:
        self._routed = 0
        self._over: torch.Tensor | int = 0
        self._dropped: torch.Tensor | int = 0

    def add(self, kept: torch.Tensor, limits: torch.Tensor) -> None:
        """Add the tokens that R routers kept (B, R), int64, given the capacities of their blocks (R,), int64."""
        excess = (kept - limits).clamp(min=0)  # (B, R)
        self._routed += kept.numel()
        self._over = self._over + (excess > 0).sum()
        self._dropped = self._dropped + excess.sum()

    def read(self) -> Overflow:
        return Overflow(routed=self._routed, over=int(self._over), dropped=int(self._dropped))
