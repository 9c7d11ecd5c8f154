"""TD-LoRA in slim networks: low-rank paths of linear layers, and the routers that gate their experts.

Gates depend on t alone. The conditioning network computes them for all steps of a trajectory, like adaLN, and
appends them to ``modulation``: paths are exact at every t, and the runtime need not know of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyexport.bundle.plan import Segment
from dyexport.lora import LoraSpec


def lora_paths(spec: LoraSpec | None, segment: Segment) -> LoraSpec | None:
    """Return the TD-LoRA whose paths a segment's network runs; None where there is none, or where it is merged."""
    return None if segment.merged else spec


class LowRankPath(nn.Module):
    """The low-rank update x A B^T of one linear layer, for rows that share one t. Experts are mixed once."""

    def __init__(self, inputs: int, outputs: int, spec: LoraSpec) -> None:
        super().__init__()
        self.spec = spec
        self.down = nn.Parameter(torch.empty(inputs, spec.rank * spec.down_experts))
        self.up = nn.Parameter(torch.empty(outputs, spec.rank * spec.up_experts))

    def forward(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Compute (R, in), gates (E,) -> (R, out)."""
        down, up = self.mix(experts.to(rows.dtype))
        return (rows @ down) @ up.t()

    def mix(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (in, rank) and B (out, rank) at gates (E,)."""
        rank, count = self.spec.rank, self.spec.experts
        if self.spec.variant == "symmetric":
            return self.down, self.up * experts.repeat(rank)
        if self.spec.variant == "inverse":
            return (self.down.view(-1, count) @ experts).view(-1, rank), self.up
        return self.down, (self.up.view(-1, count) @ experts).view(-1, rank)


class QkvPath(nn.Module):
    """Low-rank updates of query, key and value, interleaved head by head like their weights."""

    def __init__(self, channels: int, heads: int, head_dim: int, spec: LoraSpec) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (LowRankPath(channels, heads * head_dim, spec) for _ in range(3))

    def forward(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Compute (R, C), gates (E,) -> (R, H' * 3 * D)."""
        parts = [path(rows, experts).unflatten(1, (self.heads, -1)) for path in (self.query, self.key, self.value)]
        return torch.stack(parts, dim=2).flatten(1)


class GateRouters(nn.Module):
    """Gates of every block's experts from the timestep embedding, in fp32 like every router."""

    def __init__(self, channels: int, depth: int, experts: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(channels, experts, dtype=torch.float32) for _ in range(depth))

    def forward(self, embedding: Tensor) -> Tensor:
        """Compute (R, C) -> (R, L * E)."""
        return torch.cat([block(embedding.float()).softmax(dim=1) for block in self.blocks], dim=1)
