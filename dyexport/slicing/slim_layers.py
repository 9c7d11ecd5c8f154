"""Parts that slim blocks share: sizes, width gates and token selection.

Written for export. Activations are 2-D (rows, C) wherever a linear layer reads them. In half precision the
residual stream and the products are half; norms, rotary embeddings, modulation and token routers stay in fp32,
and so do the inputs and outputs of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.bundle.plan import Segment, TokenPath
from dyexport.bundle.plan_info import LARGEST_TOPK


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Widths and token path of one slim block."""

    channels: int  # C
    heads: int  # H', kept
    head_dim: int  # D
    hidden: int  # G' * S, kept channels of the MLP
    tokens: TokenSelector

    @classmethod
    def of(
        cls, config: Mapping[str, Any], segment: Segment, index: int, *, group_size: int, always_on: int = 0
    ) -> Self:
        """Return the sizes of a segment's block; MLP groups have ``group_size`` channels each."""
        return cls(
            channels=channels_of(config),
            heads=len(segment.heads[index]),
            head_dim=config["attention_head_dim"],
            hidden=len(segment.groups[index]) * group_size,
            tokens=TokenSelector.of(segment, index, always_on=always_on),
        )


class Gates(NamedTuple):
    """Gates of one block. Width gates are None where the mask is constant over the segment."""

    heads: Tensor | None  # (H',)
    groups: Tensor | None  # (G',)
    experts: Tensor | None = None  # (E,)


def split_gates(segment: Segment, width_gate: Tensor | None, experts: Tensor | None = None) -> list[Gates]:
    """Cut the gate vector (W,) into blocks, in the order of ``Segment.width_gate``; add expert gates (L, E)."""
    start = 0

    def take(units: tuple[int, ...], gated: bool) -> Tensor | None:
        nonlocal start
        if width_gate is None or not gated or not units:
            return None
        start += len(units)
        return width_gate[start - len(units) : start]

    mixed = [None] * segment.depth if experts is None else experts.unbind(0)  # L x (E,)
    gates = []
    for block in range(segment.depth):
        heads = take(segment.heads[block], segment.gated_heads[block])
        groups = take(segment.groups[block], segment.gated_groups[block])
        gates.append(Gates(heads, groups, mixed[block]))
    return gates


def gate_units(activations: Tensor, gate: Tensor | None) -> Tensor:
    """Multiply contiguous channel units by their gates: (rows, U * size), (U,) -> (rows, U * size)."""
    if gate is None:
        return activations
    units = gate.shape[0]
    sized = activations.view(-1, units, activations.shape[1] // units)  # (rows, U, size)
    return (sized * gate.view(1, -1, 1).to(sized.dtype)).flatten(1)


def gate_heads(mixed: Tensor, gate: Tensor | None) -> Tensor:
    """Multiply heads by their gates: (B, H', N, D), (H',) -> (B, H', N, D)."""
    return mixed if gate is None else mixed * gate.view(1, -1, 1, 1).to(mixed.dtype)


class CompactRouter(nn.Module):
    """Token router of the kind ``compact``: Linear -> ReLU -> Linear on the modulated input of the MLP, in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        bottleneck = max(channels // 16, 1)
        self.inner = nn.Linear(channels, bottleneck, dtype=torch.float32)
        self.outer = nn.Linear(bottleneck, 1, dtype=torch.float32)

    def forward(self, normed: Tensor) -> Tensor:
        """Compute logits (B, N) of tokens (B, N, C)."""
        rows = normed.flatten(0, 1).float()  # (B * N, C)
        logits: Tensor = self.outer(F.relu(self.inner(rows)))  # (B * N, 1)
        return logits.view(normed.shape[:2])


class Selection(NamedTuple):
    """Tokens that a branch computes, and the factors of its results.

    rows    (R,) indices into B * N tokens, or None: all of them
    weight  (R, 1), or None: 1
    kept    (B,) number of tokens that the router keeps, where that may exceed the capacity
    """

    rows: Tensor | None = None
    weight: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenSelector:
    """Token path of one block. ``use_topk`` is False where TensorRT cannot sort as many rows."""

    path: TokenPath
    capacity: int
    use_topk: bool = True

    @classmethod
    def of(cls, segment: Segment, index: int, *, always_on: int = 0) -> Self:
        """Return the selector of a segment's block; ``always_on`` tokens are kept in addition to those it counts."""
        use_topk = always_on + segment.max_capacity(index) <= LARGEST_TOPK
        return cls(path=segment.token_paths[index], capacity=segment.capacities[index], use_topk=use_topk)

    @property
    def routed(self) -> bool:
        """Return whether the block has a token router."""
        return self.path != "all"

    def select(self, scores: Tensor, slots: int, *, always_on: int = 0) -> Selection:
        """Select tokens from router logits (B, N); ``slots`` is the length of the ``slots`` input."""
        capacity = always_on + self.capacity + (slots if self.path == "dynamic" else 0)
        return select_tokens(self.path, scores, capacity, use_topk=self.use_topk)


def select_tokens(path: TokenPath, scores: Tensor, capacity: int, *, use_topk: bool = True) -> Selection:
    """Select the tokens that run from router logits (B, N); ``capacity`` bounds ``capacity`` and ``dynamic``.

    Where the router keeps more tokens than fit, those of the lowest score are dropped; without ``use_topk``, the
    last ones.
    """
    if path == "masked":
        return Selection(weight=(scores > 0).to(scores.dtype).view(-1, 1))
    if path == "compact":
        return Selection(rows=(scores.flatten() > 0).nonzero().squeeze(1))
    batch, tokens = scores.shape
    first = tokens * torch.arange(batch, device=scores.device).unsqueeze(1)  # (B, 1)
    if use_topk:
        top, index = scores.topk(capacity, dim=1, sorted=False)  # (B, K)
        rows = (index + first).flatten()  # (B * K,)
    else:
        order = (stable_partition(scores > 0) + first).flatten()  # (B * N,)
        every = torch.arange(batch * tokens, device=scores.device)
        rows = torch.zeros_like(order).index_put((order,), every).view(batch, tokens)  # (B, N)
        rows = rows[:, :capacity].flatten()  # (B * K,)
        top = scores.flatten().index_select(0, rows)  # (B * K,)
    used = (top > 0).to(scores.dtype).view(-1, 1)  # (B * K, 1): unused slots change nothing
    return Selection(rows=rows, weight=used, kept=(scores > 0).sum(dim=1))


def stable_partition(keep: Tensor) -> Tensor:
    """Return each token's place when kept tokens come first and both kinds stay in order: (B, N) -> (B, N).

    Uses running counts instead of a sort, which TensorRT has for ``LARGEST_TOPK`` rows at most.
    """
    count = keep.to(torch.int64).cumsum(dim=1)  # (B, N): kept tokens up to and including this one
    skipped = torch.arange(keep.shape[1], device=keep.device) - count  # (B, N): skipped tokens before a skipped one
    return torch.where(keep, count - 1, count[:, -1:] + skipped)


def run_selected(selection: Selection, branch: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Run ``branch`` on the selected rows of every input (B * N, K): (B * N, C), zero where a token is skipped."""
    rows = selection.rows
    picked = inputs if rows is None else tuple(value.index_select(0, rows) for value in inputs)
    update = branch(*picked)  # (R, C)
    if selection.weight is not None:
        update = update * selection.weight.to(update.dtype)
    if rows is None:
        return update
    return update.new_zeros(inputs[0].shape[0], update.shape[1]).index_put((rows,), update)
