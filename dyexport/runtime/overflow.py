"""How often a token router wanted more tokens than its block had room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """``routed`` counts steps x blocks x samples, ``over`` those past their capacity by ``dropped`` tokens in all."""

    routed: int = 0
    over: int = 0
    dropped: int = 0

    @property
    def rate(self) -> float:
        return self.over / self.routed if self.routed else 0.0


class OverflowCounter:
    """Adds up on the device; the host reads the sums when it is asked for them."""

    def __init__(self) -> None:
        self._routed = 0
        self._over: torch.Tensor | int = 0
        self._dropped: torch.Tensor | int = 0

    def add(self, kept: torch.Tensor, limits: torch.Tensor) -> None:
        """Tokens that R routers wanted, (B, R) int64, against tokens there is room for, (R,) int64."""
        excess = (kept - limits).clamp(min=0)  # (B, R)
        self._routed += kept.numel()
        self._over = self._over + (excess > 0).sum()
        self._dropped = self._dropped + excess.sum()

    def read(self) -> Overflow:
        return Overflow(routed=self._routed, over=int(self._over), dropped=int(self._dropped))
