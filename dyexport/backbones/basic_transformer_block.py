"""diffusers' ``BasicTransformerBlock``, the block of several backbones: gates, units, initialization."""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from dyexport.models.gates import BlockGates
from dyexport.models.hooks import (
    on_input,
    on_output,
    permute_inputs,
    permute_outputs,
    unit_channels,
    watch_input,
)

LORA_TARGETS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)  # attention and MLP


def attach_gates(block: BasicTransformerBlock, gates: BlockGates, *, mlp_norm: nn.Module) -> None:
    """Gate self-attention and the MLP; token routers read the input of ``mlp_norm``, the norm before the MLP."""
    on_input(block.attn1.to_out[0], gates.heads)
    on_output(block.ff.net[0].proj, gates.groups)
    watch_input(mlp_norm, gates.route)  # the residual after attention, (R, N, C)
    on_output(block.ff, gates.tokens)


@torch.no_grad()
def permute_block(block: BasicTransformerBlock, heads: Tensor, groups: Tensor) -> None:
    """Reorder heads (H,) of self-attention and MLP groups (G,) in place."""
    attention, mlp = block.attn1, block.ff
    rows = unit_channels(heads, attention.to_q.out_features // len(heads))  # (C,)
    for linear in (attention.to_q, attention.to_k, attention.to_v):
        permute_outputs(linear, rows)
    permute_inputs(attention.to_out[0], rows)
    hidden = unit_channels(groups, mlp.net[0].proj.out_features // len(groups))  # (4C,)
    permute_outputs(mlp.net[0].proj, hidden)
    permute_inputs(mlp.net[2], hidden)


def xavier_linears(backbone: nn.Module, patch: nn.Conv2d) -> None:
    """Initialize every Linear, and the patch embedding as one, with Xavier weights and zero bias."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
    assert patch.bias is not None
    nn.init.zeros_(patch.bias)
