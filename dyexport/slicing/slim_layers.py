"""Pieces that the slim networks share: width gates, token selection, adaLN, a Linear cut along its inputs.

Written for export. Activations are 2-D (rows, C) wherever a Linear reads them. In half precision the residual
stream and the products are half; norms, rotary embeddings, modulation and token routers stay in fp32, and so
do the inputs and outputs of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.bundle.manifest import Segment, TokenPath

NORM_EPS = 1e-6  # of every adaLN in DiT and FLUX


class Gates(NamedTuple):
    """Width gates of one block, absent where its mask is constant over the segment, and those of TD-LoRA's experts."""

    heads: Tensor | None  # (H',)
    groups: Tensor | None  # (G',)
    experts: Tensor | None = None  # (E,)


def split_gates(segment: Segment, width_gate: Tensor | None) -> list[Gates]:
    """Cut the gate vector (W,) into blocks, in the order of ``Segment.width_gate``."""
    gates, start = [], 0
    for block in range(segment.depth):
        parts: list[Tensor | None] = []
        for units, gated in (
            (segment.heads[block], segment.gated_heads[block]),
            (segment.groups[block], segment.gated_groups[block]),
        ):
            taken = len(units) if gated and width_gate is not None else 0
            parts.append(width_gate[start : start + taken] if taken and width_gate is not None else None)
            start += taken
        gates.append(Gates(*parts))
    return gates


def gate_units(activations: Tensor, gate: Tensor | None) -> Tensor:
    """Multiply contiguous channel units by their gates: (rows, U * size), (U,) -> (rows, U * size)."""
    if gate is None:
        return activations
    units = gate.shape[0]
    sized = activations.view(-1, units, activations.shape[1] // units)  # (rows, U, size)
    return (sized * gate.view(1, -1, 1).to(sized.dtype)).flatten(1)


def modulated_norm(hidden: Tensor, shift: Tensor, scale: Tensor, eps: float = NORM_EPS) -> Tensor:
    """adaLN: LayerNorm(x) * scale + shift, for (B, N, C) and (B, 1, C); the conditioning network has added the 1."""
    return (F.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps) * scale + shift).to(hidden.dtype)


def gated_update(hidden: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """adaLN-Zero: (B, N, C), (B, 1, C), (B, N, C) -> (B, N, C)."""
    return hidden + gate.to(hidden.dtype) * update


def embed_sinusoid(timestep: Tensor, frequencies: Tensor) -> Tensor:
    """(R,), (F,) -> (R, 2 F). Frequencies are stored: an exp of another library would move the phase at t ~ 1000."""
    angles = timestep.unsqueeze(1) * frequencies  # (R, F)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def scales_from_one(parameters: Tensor, parts: int) -> list[Tensor]:
    """Cut (R, P * C) into P parts (R, C), adding 1 to the scales, which come second of every three."""
    chunks = parameters.float().chunk(parts, dim=1)
    return [chunk + 1 if index % 3 == 1 else chunk for index, chunk in enumerate(chunks)]


class TransposedLinear(nn.Module):
    """A Linear stored (in, out), so that the first inputs are a contiguous run of its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, value: Tensor) -> Tensor:
        return torch.addmm(self.bias, value, self.weight)  # (rows, out)


class Selection(NamedTuple):
    """Which tokens a branch computes, and what their results are multiplied by.

    rows    (R,) indices into B * N tokens, or None: all of them
    weight  (R, 1), or None: 1
    kept    (B,) how many tokens the router wanted, where there may be too little room for them
    """

    rows: Tensor | None = None
    weight: Tensor | None = None
    kept: Tensor | None = None


def select_tokens(path: TokenPath, scores: Tensor, room: int, *, by_score: bool = True) -> Selection:
    """From router logits (B, N) to the tokens that run; ``room`` is what ``capacity`` and ``dynamic`` have.

    Where more tokens are wanted than fit, those of the lowest score give way; without ``by_score``, the last ones.
    """
    if path == "masked":
        return Selection(weight=(scores > 0).to(scores.dtype).view(-1, 1))
    if path == "compact":
        return Selection(rows=(scores.flatten() > 0).nonzero().squeeze(1))
    batch, tokens = scores.shape
    first = tokens * torch.arange(batch, device=scores.device).unsqueeze(1)  # (B, 1)
    if by_score:
        top, index = scores.topk(room, dim=1, sorted=False)  # (B, K)
        rows = (index + first).flatten()  # (B * K,)
    else:
        order = (kept_first(scores > 0) + first).flatten()  # (B * N,)
        every = torch.arange(batch * tokens, device=scores.device)
        rows = torch.zeros_like(order).index_put((order,), every).view(batch, tokens)[:, :room].flatten()  # (B * K,)
        top = scores.flatten().index_select(0, rows)  # (B * K,)
    used = (top > 0).to(scores.dtype).view(-1, 1)  # (B * K, 1): slots left over change nothing
    return Selection(rows=rows, weight=used, kept=(scores > 0).sum(dim=1))


def kept_first(keep: Tensor) -> Tensor:
    """Where each token goes if those that are kept come first and both kinds stay in order: (B, N) -> (B, N).

    Running counts instead of a sort, which TensorRT has for ``LARGEST_TOPK`` rows at most.
    """
    count = keep.to(torch.int64).cumsum(dim=1)  # (B, N): kept up to and with this token
    skipped = torch.arange(keep.shape[1], device=keep.device) - count  # (B, N): before this token, if it is one
    return torch.where(keep, count - 1, count[:, -1:] + skipped)


def run_selected(selection: Selection, branch: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``branch`` on the selected rows of every input (B * N, K): (B * N, C), zero where a token was skipped."""
    rows = selection.rows
    picked = inputs if rows is None else tuple(value.index_select(0, rows) for value in inputs)
    update = branch(*picked)  # (R, C)
    if selection.weight is not None:
        update = update * selection.weight.to(update.dtype)
    if rows is None:
        return update
    return update.new_zeros(inputs[0].shape[0], update.shape[1]).index_put((rows,), update)
