"""TD-LoRA (DyDiT++, arXiv 2504.06803): low-rank updates of a frozen backbone, mixed by timestep from experts.

h = W x + alpha / rank * sum_i g_i(E_t) B_i A_i x, where g is the softmax of a router on the timestep embedding
E_t. One router serves all linears of a block. A and B are stored (channels, rank, experts): heads and MLP groups
are rows of them, like those of a Linear's weight, and are sliced in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dyexport.lora import LoraSpec
from dyexport.models.routers import fp32_linear


class LowRank(nn.Module):
    """Low-rank update of one Linear. B starts at zero, so that training starts from the backbone."""

    def __init__(self, inputs: int, outputs: int, spec: LoraSpec) -> None:
        super().__init__()
        self.spec = spec
        bound = 1 / math.sqrt(inputs)  # of a Linear's weight
        self.down = nn.Parameter(torch.empty(inputs, spec.rank, spec.down_experts).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(outputs, spec.rank, spec.up_experts))

    def forward(self, value: Tensor, gates: Tensor) -> Tensor:
        """Compute (B, N, in), gates (B, E) -> (B, N, out)."""
        down, up = self.factors(gates)
        hidden = value @ down.to(value.dtype)  # (B, N, R)
        return self.spec.scale * (hidden @ up.to(value.dtype).transpose(1, 2))

    def factors(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Mix A and B at gates (B, E): (B, in, R), (B, out, R). A factor that all samples share has one row."""
        if self.spec.variant == "symmetric":
            return self.down.flatten(1)[None], (self.up * gates[:, None, None]).flatten(2)
        return _mixed(self.down, gates), _mixed(self.up, gates)

    def change(self, gates: Tensor) -> Tensor:
        """Compute the change of the Linear's weight at gates (E,): (out, in)."""
        down, up = self.factors(gates[None])
        return self.spec.scale * (up[0] @ down[0].T)


def _mixed(factor: Tensor, gates: Tensor) -> Tensor:
    """Mix the experts of a factor: (C, r, E or 1), (B, E) -> (B or 1, C, r)."""
    return factor.flatten(1)[None] if factor.shape[2] == 1 else torch.einsum("cre,be->bcr", factor, gates)


class BlockLora(nn.Module):
    """Updates of one block's linears, and the router that mixes their experts; None with one expert.

    The router starts at random weights. If it started uniform, all experts would get equal gradients and stay equal.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], channels: int, spec: LoraSpec) -> None:
        super().__init__()
        self.router = nn.Linear(channels, spec.experts) if spec.experts > 1 else None
        self.layers = nn.ModuleDict(
            {key_of(name): LowRank(linear.in_features, linear.out_features, spec) for name, linear in linears.items()}
        )
        self.gates: Tensor | None = None  # (B, E), of the current pass
        self.handles = [self._attach(self.layer(name), linear) for name, linear in linears.items()]

    def _attach(self, layer: LowRank, linear: nn.Linear) -> RemovableHandle:
        return linear.register_forward_hook(partial(_add_update, self, layer), prepend=True)  # before width gates

    def layer(self, name: str) -> LowRank:
        """Return the update of a linear, by its name in the block."""
        return cast(LowRank, self.layers[key_of(name)])

    def gates_at(self, embedding: Tensor) -> Tensor:
        """Compute expert gates in fp32: (B, C) -> (B, E)."""
        if self.router is None:
            return embedding.new_ones(len(embedding), 1, dtype=torch.float32)
        return fp32_linear(self.router, embedding).softmax(dim=-1)

    @torch.no_grad()
    def merge(self, linears: Mapping[str, nn.Linear]) -> None:
        """Add the updates of a single expert to the linears' weights, and remove the hooks."""
        for name, linear in linears.items():
            linear.weight += self.layer(name).change(linear.weight.new_ones(1))
        for handle in self.handles:
            handle.remove()


# A partial of a function, not a closure: a copied model's hooks must act on the copy.
def _add_update(block: BlockLora, layer: LowRank, linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    assert block.gates is not None
    rows = inputs[0].reshape(len(block.gates), -1, inputs[0].shape[-1])  # a block may see a sample as several rows
    update: Tensor = layer(rows, block.gates)
    return output + update.view(output.shape)


class TdLora(nn.Module):
    """TD-LoRA of a whole backbone, attached by forward hooks."""

    def __init__(self, blocks: Iterable[Mapping[str, nn.Linear]], channels: int, spec: LoraSpec) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(BlockLora(linears, channels, spec) for linears in blocks)
        self.fixed: Tensor | None = None  # gates (L, E) for every t, in place of the routers'

    @property
    def block_loras(self) -> list[BlockLora]:
        return cast(list[BlockLora], list(self.blocks))

    def gates_at(self, embedding: Tensor) -> Tensor:
        """Compute expert gates of every block: (B, C) -> (B, L, E)."""
        if self.fixed is not None:
            return self.fixed.expand(len(embedding), -1, -1)
        return torch.stack([block.gates_at(embedding) for block in self.block_loras], dim=1)

    def follow(self, gates: Tensor | None) -> None:
        """Set the gates (B, L, E) that mix experts in the next pass; None to reset."""
        mixed = [None] * len(self.blocks) if gates is None else gates.unbind(1)
        for block, own in zip(self.block_loras, mixed, strict=True):
            block.gates = own


def key_of(name: str) -> str:
    """Turn a linear's name in its block into a key without dots."""
    return name.replace(".", "-")
