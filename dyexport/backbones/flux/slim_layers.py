"""Parts that double and single blocks of a slim FLUX share.

Heads are stored with the even channels of a query and key first, so that a rotary embedding turns one half
against the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.lora import LoraSpec
from dyexport.slicing.linears import QkvLinear, SlimLinear, TransposedLinear
from dyexport.slicing.modulation import NORM_EPS
from dyexport.slicing.slim_layers import BlockSizes, Gates, gate_heads, gate_units


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, (S, D / 2) each."""

    cos: Tensor
    sin: Tensor

    def turn(self, heads: Tensor) -> Tensor:
        """Rotate (B, H', S, D) -> (B, H', S, D)."""
        first, second = heads.chunk(2, dim=-1)  # (B, H', S, D / 2)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)


class Projection(nn.Module):
    """Normed query and key, and value, of the kept heads of one stream of tokens."""

    def __init__(self, sizes: BlockSizes, td_lora: LoraSpec | None) -> None:
        super().__init__()
        self.heads, self.head_dim = sizes.heads, sizes.head_dim
        self.qkv = QkvLinear(sizes.channels, sizes.heads, sizes.head_dim, td_lora)
        self.query_norm = nn.Parameter(torch.empty(sizes.head_dim, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.empty(sizes.head_dim, dtype=torch.float32))

    def forward(self, normed: Tensor, gates: Gates) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (B, N, C) -> 3 x (B, H', N, D)."""
        batch, tokens, _ = normed.shape
        qkv = self.qkv(normed.flatten(0, 1), gates.experts)  # (B * N, H' * 3 * D)
        qkv = qkv.view(batch, tokens, self.heads, 3, self.head_dim)
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # (B, H', N, D)
        return rms_norm(query, self.query_norm), rms_norm(key, self.key_norm), value


def rms_norm(heads: Tensor, weight: Tensor) -> Tensor:
    """Normalize the last dimension as diffusers' ``RMSNorm``: (..., D) -> (..., D), in fp32."""
    heads = heads.float()
    return heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight


def attend(query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, gates: Gates) -> Tensor:
    """Run attention of the kept heads: 3 x (B, H', S, D) -> (B, S, H' * D). The query's norm has scaled it."""
    query, key = rotary.turn(query).to(value.dtype), rotary.turn(key).to(value.dtype)  # (B, H', S, D)
    mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, H', S, D)
    return gate_heads(mixed, gates.heads).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """The kept groups of an FFN."""

    def __init__(self, sizes: BlockSizes, td_lora: LoraSpec | None) -> None:
        super().__init__()
        self.fc1 = SlimLinear(sizes.channels, sizes.hidden, td_lora)
        self.fc2 = TransposedLinear(sizes.hidden, sizes.channels, td_lora)

    def forward(self, rows: Tensor, gates: Gates) -> Tensor:
        """Compute (R, C) -> (R, C)."""
        wide = F.gelu(self.fc1(rows, gates.experts), approximate="tanh")  # (R, G' * S)
        update: Tensor = self.fc2(gate_units(wide, gates.groups), gates.experts)  # (R, C)
        return update
