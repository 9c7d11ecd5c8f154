"""Modulation of the network at each t, computed for many timesteps in one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from dyexport.engines.base import Engine, Tensors
from dyexport.runtime.inputs import for_engine

if TYPE_CHECKING:
    import torch

MEMORY = 512 * 2**20  # bytes of cached modulation
TRAJECTORIES = 2  # cached: guidance in two calls alternates between prompt and negative prompt


class _Seen(NamedTuple):
    """A caller's tensor, and its version when it was seen; changes in place count versions."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Seen | None:
        """Return None if a change could go unnoticed: NumPy shares CPU memory, inference mode counts no versions."""
        return None if tensor.is_cpu or tensor.is_inference() else cls(tensor, tensor._version)

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Return True for the same tensor, or a view of all of it, unchanged. Does not read from the device."""
        return (
            tensor.untyped_storage()._cdata == self.tensor.untyped_storage()._cdata
            and (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
            == (self.tensor.dtype, self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())
            and not tensor.is_inference()
            and tensor._version == self.version
        )


@dataclass(kw_only=True, eq=False)  # comparing tensors gives no single truth value
class _Trajectory:
    """One set of conditions, the timesteps that were requested for it, in order, and the rows computed so far.

    ``conditions`` are copies of the tensors of the caller, and ``originals`` identifies those tensors.
    """

    conditions: Tensors
    originals: dict[str, _Seen | None]
    seen: dict[float, None] = field(default_factory=dict)
    rows: dict[float, torch.Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Rows per timestep: one that all samples share if there are no conditions but t."""
        return len(next(iter(self.conditions.values()))) if self.conditions else 1

    def has(self, conditions: Tensors) -> bool:
        """Return True for the same conditions. Reads them from the device only if they may have changed."""
        same = self.conditions.keys() == conditions.keys() and all(map(self._has, conditions, conditions.values()))
        if same:
            self.originals = _seen(conditions)
        return same

    def _has(self, name: str, tensor: torch.Tensor) -> bool:
        import torch

        seen, copy = self.originals[name], self.conditions[name]
        if seen is not None and seen.is_same(tensor):
            return True
        alike = (copy.shape, copy.dtype, copy.device) == (tensor.shape, tensor.dtype, tensor.device)
        return alike and torch.equal(copy, tensor)


class Conditioner:
    """Cache of ``modulation`` rows by t, for the conditions (labels, text) of the current trajectories.

    The conditioning network reads its weights once per run, for any number of timesteps, and pipelines repeat their
    timesteps from one sample to the next. So when a trajectory with new conditions starts at a known t, the rows of the
    timesteps that followed it in the last trajectory are computed in the same run. Without conditions all samples share
    one trajectory. With ``resident`` False the engine is parked after each run.
    """

    def __init__(
        self, engine: Engine, *, resident: bool = True, memory: int = MEMORY, device: torch.device | str = "cpu"
    ) -> None:
        self.engine = engine
        self.device = device
        self.seconds = 0.0  # in the engine, in total
        self._resident = resident
        self._memory = memory
        self._current: list[_Trajectory] = []  # most recently used last
        self._expected: list[float] = []  # timesteps of the last trajectory

    def at(self, t: float, conditions: Tensors) -> torch.Tensor:
        """Return ``modulation`` (B, M) for conditions (B, ...), or (1, M) without conditions.

        Conditions may be on any device, in any floating-point dtype.
        """
        trajectory = self._find(conditions)
        if t not in trajectory.rows:
            self._compute(trajectory, self._following(trajectory, t))
        trajectory.seen[t] = None
        return trajectory.rows[t]

    def _find(self, conditions: Tensors) -> _Trajectory:
        trajectory = next((known for known in self._current if known.has(conditions)), None)
        if trajectory is None:
            trajectory = self._begin(conditions)
        else:
            self._current.remove(trajectory)
        self._current.append(trajectory)
        return trajectory

    def _begin(self, conditions: Tensors) -> _Trajectory:
        """Start a trajectory: evict the least recently used one, and expect its timesteps again."""
        full = len(self._current) == TRAJECTORIES
        last = self._current.pop(0) if full else next(reversed(self._current), None)
        if last is not None and len(last.seen) > 1:
            self._expected = list(last.seen)
        copies = {name: tensor.clone() for name, tensor in conditions.items()}
        return _Trajectory(conditions=copies, originals=_seen(conditions))

    def _following(self, trajectory: _Trajectory, t: float) -> list[float]:
        """Return ``t`` and the timesteps expected after it, as many as the cache holds."""
        after = self._expected[self._expected.index(t) :] if t in self._expected else [t]
        return after[: max(self._room(trajectory) // self._row_bytes(trajectory.batch), 1)]

    def _room(self, trajectory: _Trajectory) -> int:
        """Return the bytes that a trajectory's rows may take: all of them if there are no conditions to have others."""
        return self._memory // TRAJECTORIES if trajectory.conditions else self._memory

    def _compute(self, trajectory: _Trajectory, timesteps: list[float]) -> None:
        import torch

        batch = trajectory.batch
        t = torch.tensor(timesteps, dtype=torch.float32, device=self.device).repeat_interleave(batch)  # (S * B,)
        moved = {name: for_engine(tensor, self.device) for name, tensor in trajectory.conditions.items()}
        tiled = {name: tensor.repeat(len(timesteps), *[1] * (tensor.ndim - 1)) for name, tensor in moved.items()}
        begin = perf_counter()
        modulation = self.engine.run({"timestep": t, **tiled})["modulation"]  # (S * B, M)
        self.seconds += perf_counter() - begin
        if (len(trajectory.rows) + len(timesteps)) * self._row_bytes(batch) > self._room(trajectory):
            trajectory.rows.clear()
        trajectory.rows |= dict(zip(timesteps, modulation.split(batch), strict=True))
        if not self._resident:
            self.engine.park()

    def _row_bytes(self, batch: int) -> int:
        """Return the bytes of one timestep's rows."""
        output = self.engine.io.outputs[0]
        return batch * prod(size for size in output.shape if isinstance(size, int)) * 4

    def close(self) -> None:
        """Free the engine and the cached rows."""
        self.engine.close()
        self._current.clear()


def _seen(conditions: Tensors) -> dict[str, _Seen | None]:
    return {name: _Seen.of(tensor) for name, tensor in conditions.items()}
