"""What double and single blocks of a slim FLUX are made of.

Heads are stored with the even channels of a query and key first, so that a rotary embedding turns one half
against the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.lora import LoraSpec
from dyexport.slicing.slim_layers import NORM_EPS, Gates, TransposedLinear, gate_units
from dyexport.slicing.slim_lora import WithPaths

ROUTER_EPS = 1e-5


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, each (S, D / 2)."""

    cos: Tensor
    sin: Tensor

    def turn(self, heads: Tensor) -> Tensor:
        """(B, H', S, D) -> (B, H', S, D)."""
        first, second = heads.chunk(2, dim=-1)  # (B, H', S, D / 2)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)


class Projection(WithPaths):
    """Normed query and key, and value, of the kept heads of one stream of tokens."""

    def __init__(self, channels: int, heads: int, head_dim: int, td_lora: LoraSpec | None) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(channels, 3 * heads * head_dim)
        self.add_paths(td_lora, qkv=(heads, head_dim))
        self.query_norm = nn.Parameter(torch.empty(head_dim))
        self.key_norm = nn.Parameter(torch.empty(head_dim))

    def forward(self, normed: Tensor, gates: Gates) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> 3 x (B, H', N, D)."""
        batch, tokens, _ = normed.shape
        qkv = self.linear("qkv", normed.flatten(0, 1), gates).view(batch, tokens, self.heads, 3, self.head_dim)
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # (B, H', N, D)
        return rms_norm(query, self.query_norm), rms_norm(key, self.key_norm), value


def rms_norm(heads: Tensor, weight: Tensor) -> Tensor:
    """Over the last dimension, as diffusers' ``RMSNorm``: (..., D) -> (..., D), in fp32."""
    heads = heads.float()
    return heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight


def attend(query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, gate: Tensor | None) -> Tensor:
    """Attention of the kept heads: 3 x (B, H', S, D) -> (B, S, H' * D). The query's norm has scaled it."""
    query, key = rotary.turn(query).to(value.dtype), rotary.turn(key).to(value.dtype)  # (B, H', S, D)
    mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, H', S, D)
    if gate is not None:
        mixed = mixed * gate.view(1, -1, 1, 1).to(mixed.dtype)
    return mixed.transpose(1, 2).flatten(2)


class FeedForward(WithPaths):
    """The kept groups of an FFN."""

    def __init__(self, channels: int, wide: int, td_lora: LoraSpec | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, wide)
        self.fc2 = TransposedLinear(wide, channels)
        self.add_paths(td_lora, "fc1", "fc2")

    def forward(self, rows: Tensor, gates: Gates) -> Tensor:
        """(R, C) -> (R, C)."""
        wide = gate_units(F.gelu(self.linear("fc1", rows, gates), approximate="tanh"), gates.groups)  # (R, G' * S)
        return self.linear("fc2", wide, gates)


class RouterInput(NamedTuple):
    """A token router's weights at this sigma: (B, 1, C), (B, 1, C), (B, 1)."""

    image: Tensor
    text: Tensor
    constant: Tensor

    def scores(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits of image tokens (B, N, C) beside text tokens (B, T, C): (B, N)."""
        channels = image.shape[-1:]
        text_mean = F.layer_norm(text.float(), channels, eps=ROUTER_EPS).mean(1)  # (B, C)
        offset = (text_mean * self.text.squeeze(1)).sum(1, keepdim=True) + self.constant  # (B, 1)
        normed = F.layer_norm(image.float(), channels, eps=ROUTER_EPS)  # (B, N, C)
        return (normed @ self.image.transpose(1, 2)).squeeze(2) + offset
