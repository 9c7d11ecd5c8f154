"""What conditions the network at each t, computed for many timesteps in one product."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from dyexport.engines.base import Engine, Tensors
from dyexport.runtime.inputs import for_engine

if TYPE_CHECKING:
    import torch

MEMORY = 512 * 2**20  # bytes of modulation that are kept
TRAJECTORIES = 2  # at a time: guidance in two calls alternates between prompt and negative prompt


class _Seen(NamedTuple):
    """A caller's tensor, and how often it had been changed in place when it was seen."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Seen | None:
        """None where a change would go unnoticed: NumPy may share memory on the CPU, inference mode counts nothing."""
        return None if tensor.is_cpu or tensor.is_inference() else cls(tensor, tensor._version)

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Return whether it is that tensor, or a view of all of it, unchanged. Reads nothing from the device."""
        return (
            tensor.untyped_storage()._cdata == self.tensor.untyped_storage()._cdata
            and (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
            == (self.tensor.dtype, self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())
            and not tensor.is_inference()
            and tensor._version == self.version
        )


@dataclass(kw_only=True, eq=False)  # tensors have no truth value to compare by
class _Trajectory:
    """One set of conditions, the timesteps asked for under it in order, and the rows that are ready.

    ``conditions`` are copies of what the caller gave last, ``given``.
    """

    conditions: Tensors
    given: dict[str, _Seen | None]
    seen: dict[float, None] = field(default_factory=dict)
    rows: dict[float, torch.Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Rows for each timestep: one that all samples share, where t is all there is."""
        return len(next(iter(self.conditions.values()))) if self.conditions else 1

    def has(self, conditions: Tensors) -> bool:
        """Return whether these are its conditions. Reads them from the device only if they may have changed."""
        same = self.conditions.keys() == conditions.keys() and all(map(self._has, conditions, conditions.values()))
        if same:
            self.given = _seen(conditions)
        return same

    def _has(self, name: str, tensor: torch.Tensor) -> bool:
        import torch

        seen, copy = self.given[name], self.conditions[name]
        if seen is not None and seen.is_same(tensor):
            return True
        alike = (copy.shape, copy.dtype, copy.device) == (tensor.shape, tensor.dtype, tensor.device)
        return alike and torch.equal(copy, tensor)


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
        """``modulation`` for conditions whose first dimension is the batch: (B, M), (1, M) without conditions.

        They may be on any device, in any floating-point dtype.
        """
        trajectory = self._find(conditions)
        if t not in trajectory.rows:
            self._compute(trajectory, self._following(trajectory, t))
        trajectory.seen[t] = None
        return trajectory.rows[t]

    def _find(self, conditions: Tensors) -> _Trajectory:
        found = next((each for each in self._under_way if each.has(conditions)), None)
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
        copies = {name: tensor.clone() for name, tensor in conditions.items()}
        return _Trajectory(conditions=copies, given=_seen(conditions))

    def _following(self, trajectory: _Trajectory, t: float) -> list[float]:
        """``t`` and the timesteps expected after it, as many as may be kept."""
        after = self._expected[self._expected.index(t) :] if t in self._expected else [t]
        return after[: max(self._memory // self._row_bytes(trajectory.batch), 1)]

    def _compute(self, trajectory: _Trajectory, timesteps: list[float]) -> None:
        import torch

        batch = trajectory.batch
        t = torch.tensor(timesteps, dtype=torch.float32, device=self.device).repeat_interleave(batch)  # (S * B,)
        moved = {name: for_engine(tensor, self.device) for name, tensor in trajectory.conditions.items()}
        tiled = {name: tensor.repeat(len(timesteps), *[1] * (tensor.ndim - 1)) for name, tensor in moved.items()}
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


def _seen(conditions: Tensors) -> dict[str, _Seen | None]:
    return {name: _Seen.of(tensor) for name, tensor in conditions.items()}
