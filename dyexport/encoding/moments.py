"""Mean and standard deviation of latents, summed shard by shard."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Number, sum and sum of squares of latents."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Sum values of any shape in fp64."""
        exact = values.double()
        return cls(count=values.numel(), total=float(exact.sum()), squares=float(exact.square().sum()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            count=self.count + other.count, total=self.total + other.total, squares=self.squares + other.squares
        )

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0))
