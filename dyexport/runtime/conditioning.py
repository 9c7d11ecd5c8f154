"""What conditions the network at each t, computed for many timesteps in one product."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING

from dyexport.engines.base import Engine, Tensors

if TYPE_CHECKING:
    import torch

MEMORY = 512 * 2**20  # bytes of modulation that are kept
TRAJECTORIES = 2  # at a time: guidance in two calls alternates between prompt and negative prompt


@dataclass(kw_only=True, eq=False)  # tensors have no truth value to compare by
class _Trajectory:
    """One set of conditions, the timesteps asked for under it in order, and the rows that are ready."""

    conditions: Tensors
    seen: dict[float, None] = field(default_factory=dict)
    rows: dict[float, torch.Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Rows for each timestep: one that all samples share, where t is all there is."""
        return len(next(iter(self.conditions.values()))) if self.conditions else 1


class Conditioner:
    """Rows of ``modulation`` by t, for the conditions (labels, text) of the trajectory under way.

    The conditioning network's weights are read once per product, however many timesteps it is for, and
    pipelines repeat their timesteps from one picture to the next. So when new conditions begin at a t
    that was seen before, the rows of the timesteps that followed it then are computed with it. Without
    conditions there is one trajectory, whose rows serve every picture. With ``resident`` False the engine
    is parked after each product.
    """

    def __init__(
        self, engine: Engine, *, resident: bool = True, memory: int = MEMORY, device: torch.device | str = "cpu"
    ) -> None:
        self.engine = engine
        self.device = device
        self.seconds = 0.0  # in the engine, so far
        self._resident = resident
        self._memory = memory // TRAJECTORIES
        self._under_way: list[_Trajectory] = []  # the one used last at the end
        self._expected: list[float] = []  # timesteps of a trajectory before

    def at(self, t: float, conditions: Tensors) -> torch.Tensor:
        """``modulation`` for conditions whose first dimension is the batch: (B, M), (1, M) without conditions."""
        trajectory = self._find(conditions)
        if t not in trajectory.rows:
            self._compute(trajectory, self._following(trajectory, t))
        trajectory.seen[t] = None
        return trajectory.rows[t]

    def _find(self, conditions: Tensors) -> _Trajectory:
        found = next((each for each in self._under_way if _equal(each.conditions, conditions)), None)
        if found is None:
            found = self._begin(conditions)
        else:
            self._under_way.remove(found)
        self._under_way.append(found)
        return found

    def _begin(self, conditions: Tensors) -> _Trajectory:
        """New conditions take the place of those used longest ago, and their timesteps as what to expect."""
        full = len(self._under_way) == TRAJECTORIES
        before = self._under_way.pop(0) if full else next(reversed(self._under_way), None)
        if before is not None and len(before.seen) > 1:
            self._expected = list(before.seen)
        return _Trajectory(conditions={name: tensor.clone() for name, tensor in conditions.items()})

    def _following(self, trajectory: _Trajectory, t: float) -> list[float]:
        """``t`` and the timesteps expected after it, as many as may be kept."""
        after = self._expected[self._expected.index(t) :] if t in self._expected else [t]
        return after[: max(self._memory // self._row_bytes(trajectory.batch), 1)]

    def _compute(self, trajectory: _Trajectory, timesteps: list[float]) -> None:
        import torch

        batch, conditions = trajectory.batch, trajectory.conditions.items()
        t = torch.tensor(timesteps, dtype=torch.float32, device=self.device).repeat_interleave(batch)  # (S * B,)
        tiled = {name: tensor.repeat(len(timesteps), *[1] * (tensor.ndim - 1)) for name, tensor in conditions}
        begin = perf_counter()
        modulation = self.engine.run({"timestep": t, **tiled})["modulation"]  # (S * B, M)
        self.seconds += perf_counter() - begin
        if (len(trajectory.rows) + len(timesteps)) * self._row_bytes(batch) > self._memory:
            trajectory.rows.clear()
        trajectory.rows |= dict(zip(timesteps, modulation.split(batch), strict=True))
        if not self._resident:
            self.engine.park()

    def _row_bytes(self, batch: int) -> int:
        """Bytes of one timestep's rows."""
        output = self.engine.io.outputs[0]
        return batch * prod(size for size in output.shape if isinstance(size, int)) * 4

    def close(self) -> None:
        """Free the engine and the rows."""
        self.engine.close()
        self._under_way.clear()


def _equal(left: Tensors, right: Tensors) -> bool:
    import torch

    return left.keys() == right.keys() and all(
        left[name].shape == right[name].shape and torch.equal(left[name], right[name]) for name in left
    )
