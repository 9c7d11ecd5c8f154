"""TD-LoRA in slim networks: low-rank paths beside linears, and the routers that gate their experts.

Gates depend on t alone. The conditioning network computes them for all steps of a trajectory, like adaLN, and
appends them to ``modulation``: paths are exact at every t, and the runtime need not know of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyexport.bundle.manifest import Segment
from dyexport.lora import LoraSpec
from dyexport.slicing.slim_layers import Gates, TransposedLinear, split_gates


def gates_size(spec: LoraSpec | None, depth: int) -> int:
    """Entries at the end of ``modulation`` that are gates."""
    return 0 if spec is None else depth * spec.experts


def with_experts(segment: Segment, width_gate: Tensor | None, modulation: Tensor, spec: LoraSpec | None) -> list[Gates]:
    """The gates of every block, from (W,) and the end of (B, M), whose samples share one t."""
    gates = split_gates(segment, width_gate)
    if spec is None:
        return gates
    size = gates_size(spec, segment.depth)
    experts = modulation[0, modulation.shape[1] - size :].view(segment.depth, spec.experts)  # (L, E)
    return [block._replace(experts=mixed) for block, mixed in zip(gates, experts.unbind(0), strict=True)]


def lora_paths(spec: LoraSpec | None, segment: Segment) -> LoraSpec | None:
    """What paths a segment has beside its linears."""
    return None if segment.merged else spec


class LowRankPath(nn.Module):
    """x A B^T at one t. Experts are mixed first, once for all rows."""

    def __init__(self, inputs: int, outputs: int, spec: LoraSpec) -> None:
        super().__init__()
        self.spec = spec
        self.down = nn.Parameter(torch.empty(inputs, spec.rank * spec.down_experts))
        self.up = nn.Parameter(torch.empty(outputs, spec.rank * spec.up_experts))

    def forward(self, rows: Tensor, experts: Tensor) -> Tensor:
        """(R, in), gates (E,) -> (R, out)."""
        down, up = self.mix(experts.to(rows.dtype))
        return (rows @ down) @ up.t()

    def mix(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """A (in, R) and B (out, R)."""
        rank, count = self.spec.rank, self.spec.experts
        if self.spec.variant == "symmetric":
            return self.down, self.up * experts.repeat(rank)
        if self.spec.variant == "inverse":
            return (self.down.view(-1, count) @ experts).view(-1, rank), self.up
        return self.down, (self.up.view(-1, count) @ experts).view(-1, rank)


class QkvPath(nn.Module):
    """Paths of query, key and value, interleaved head by head as their weights are."""

    def __init__(self, channels: int, heads: int, head_dim: int, spec: LoraSpec) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (LowRankPath(channels, heads * head_dim, spec) for _ in range(3))

    def forward(self, rows: Tensor, experts: Tensor) -> Tensor:
        """(R, C), gates (E,) -> (R, H' * 3 * D)."""
        parts = [path(rows, experts).unflatten(1, (self.heads, -1)) for path in (self.query, self.key, self.value)]
        return torch.stack(parts, dim=2).flatten(1)


class WithPaths(nn.Module):
    """A module whose linears may have low-rank paths beside them, in ``low_rank`` under the same names."""

    low_rank: nn.ModuleDict | None

    def add_paths(self, spec: LoraSpec | None, *names: str, qkv: tuple[int, int] | None = None) -> None:
        """Paths for linears by name; ``qkv`` are heads and their size where there is a linear of that name."""
        self.low_rank = None
        if spec is not None:
            paths: dict[str, nn.Module] = {name: LowRankPath(*_sizes(getattr(self, name)), spec) for name in names}
            if qkv is not None:
                paths["qkv"] = QkvPath(_sizes(getattr(self, "qkv"))[0], *qkv, spec)  # noqa: B009
            self.low_rank = nn.ModuleDict(paths)

    def linear(self, name: str, rows: Tensor, gates: Gates) -> Tensor:
        """A linear, and its path: (R, in) -> (R, out)."""
        out: Tensor = getattr(self, name)(rows)
        return self.updated(out, name, rows, gates)

    def updated(self, out: Tensor, name: str, rows: Tensor, gates: Gates) -> Tensor:
        """What a linear makes of rows (R, in), and what its path adds: (R, out)."""
        return out if self.low_rank is None else out + self.low_rank[name](rows, gates.experts)


def _sizes(linear: nn.Linear | TransposedLinear | Tensor) -> tuple[int, int]:
    """Inputs and outputs; a bare weight is stored as a ``TransposedLinear``'s."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    inputs, outputs = (linear if isinstance(linear, Tensor) else linear.weight).shape
    return inputs, outputs


class GateRouters(nn.Module):
    """Gates of every block's experts from the timestep embedding, in fp32 like every router."""

    def __init__(self, channels: int, depth: int, experts: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(channels, experts) for _ in range(depth))

    def forward(self, embedding: Tensor) -> Tensor:
        """(R, C) -> (R, L * E)."""
        return torch.cat([block(embedding.float()).softmax(dim=1) for block in self.blocks], dim=1)
