"""What conditions the network at each t, computed for many timesteps in one product."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from dyexport.engines.base import Engine, Tensors

if TYPE_CHECKING:
    import torch

MEMORY = 256 * 2**20  # bytes of modulation that are kept


class Conditioner:
    """Rows of ``modulation`` by t, for the conditions (labels, text) of the trajectory under way.

    The conditioning network's weights are read once per product, however many timesteps it is for, and
    pipelines repeat their timesteps from one picture to the next. So when new conditions begin at a t
    that was seen before, the rows of the timesteps that followed it then are computed with it. With
    ``resident`` False the engine is closed after each product.
    """

    def __init__(self, engine: Engine, *, resident: bool = True, memory: int = MEMORY) -> None:
        self.engine = engine
        self._resident = resident
        self._memory = memory
        self._conditions: Tensors = {}
        self._rows: dict[float, torch.Tensor] = {}
        self._seen: dict[float, None] = {}  # timesteps asked for under these conditions, in order
        self._expected: list[float] = []  # ... and under those before

    def at(self, t: float, conditions: Tensors) -> torch.Tensor:
        """``modulation`` (B, M) for conditions whose first dimension is the batch."""
        if not _equal(conditions, self._conditions):
            self._begin(conditions)
        if t not in self._rows:
            self._compute(self._following(t))
        self._seen[t] = None
        return self._rows[t]

    def _begin(self, conditions: Tensors) -> None:
        self._conditions = {name: tensor.clone() for name, tensor in conditions.items()}
        self._expected = list(self._seen)
        self._rows.clear()
        self._seen.clear()

    def _following(self, t: float) -> list[float]:
        """``t`` and the timesteps expected after it, as many as may be kept."""
        after = self._expected[self._expected.index(t) :] if t in self._expected else [t]
        return after[: max(self._memory // self._row_bytes, 1)]

    def _compute(self, timesteps: list[float]) -> None:
        import torch

        first = next(iter(self._conditions.values()))
        batch = len(first)
        t = torch.tensor(timesteps, device=first.device).repeat_interleave(batch)  # (S * B,)
        conditions = self._conditions.items()
        tiled = {name: tensor.repeat(len(timesteps), *[1] * (tensor.ndim - 1)) for name, tensor in conditions}
        modulation = self.engine.run({"timestep": t, **tiled})["modulation"]  # (S * B, M)
        if (len(self._rows) + len(timesteps)) * self._row_bytes > self._memory:
            self._rows.clear()
        self._rows |= dict(zip(timesteps, modulation.split(batch), strict=True))
        if not self._resident:
            self.engine.close()

    @property
    def _row_bytes(self) -> int:
        """Bytes of one timestep's rows."""
        output = self.engine.io.outputs[0]
        batch = len(next(iter(self._conditions.values())))
        return batch * prod(size for size in output.shape if isinstance(size, int)) * 4

    def close(self) -> None:
        """Free the engine and the rows."""
        self.engine.close()
        self._rows.clear()
        self._conditions = {}


def _equal(left: Tensors, right: Tensors) -> bool:
    import torch

    return left.keys() == right.keys() and all(
        left[name].shape == right[name].shape and torch.equal(left[name], right[name]) for name in left
    )
