"""The slim DiT: a static network from which a segment's unused heads and MLP channels are gone.

Everything that depends on t and the label alone is in the conditioning network (``slim_conditioning``), which runs
once for all steps of a trajectory. The network here runs at each step, with query, key and value in one product.
The dense network is the same module with every unit kept, so that timings of the two compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.backbones.dit.slim_conditioning import DiTLayout
from dyexport.bundle.plan import Segment
from dyexport.lora import LoraSpec
from dyexport.slicing.linears import QkvLinear, SlimLinear, TransposedLinear
from dyexport.slicing.modulation import BlockModulation, Modulation, gated_update, modulated_norm
from dyexport.slicing.slim_layers import (
    BlockSizes,
    Gates,
    Selection,
    gate_heads,
    gate_units,
    run_selected,
    split_gates,
)
from dyexport.slicing.slim_lora import lora_paths


class SlimBlock(nn.Module):
    """Attention and MLP of an adaLN-Zero block, at the widths and on the token path of its segment.

    Blocks of other backbones than DiT share it: those made of diffusers' ``BasicTransformerBlock``.
    """

    def __init__(self, sizes: BlockSizes, *, mlp_eps: float, td_lora: LoraSpec | None) -> None:
        super().__init__()
        self.sizes = sizes
        self.mlp_eps = mlp_eps
        channels, attended = sizes.channels, sizes.heads * sizes.head_dim
        self.qkv = QkvLinear(channels, sizes.heads, sizes.head_dim, td_lora)
        self.out = TransposedLinear(attended, channels, td_lora)
        self.fc1 = SlimLinear(channels, sizes.hidden, td_lora)
        self.fc2 = TransposedLinear(sizes.hidden, channels, td_lora)
        if sizes.tokens.routed:
            bottleneck = max(channels // 16, 1)
            self.router_in = nn.Linear(channels, bottleneck, dtype=torch.float32)
            self.router_out = nn.Linear(bottleneck, 1, dtype=torch.float32)

    def attend(self, normed: Tensor, gates: Gates) -> Tensor:
        """Run self-attention of the kept heads: (B, N, C) -> (B, N, C)."""
        batch, tokens, channels = normed.shape
        heads, head_dim = self.sizes.heads, self.sizes.head_dim
        qkv = self.qkv(normed.flatten(0, 1), gates.experts)  # (B * N, H' * 3 * D)
        qkv = qkv.view(batch, tokens, heads, 3, head_dim).permute(3, 0, 2, 1, 4)  # (3, B, H', N, D)
        query, key, value = qkv.unbind(0)  # (B, H', N, D)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, H', N, D), scaled by query weights
        mixed = gate_heads(mixed, gates.heads)
        mixed = mixed.transpose(1, 2).reshape(batch * tokens, heads * head_dim)  # (B * N, H' * D)
        update: Tensor = self.out(mixed, gates.experts)  # (B * N, C)
        return update.view(batch, tokens, channels)

    def feed(self, hidden: Tensor, modulation: Modulation, gates: Gates, slots: int) -> tuple[Tensor, Tensor | None]:
        """Run the MLP: (B, N, C) -> (B, N, C), and the kept tokens (B,) where the capacity is limited."""
        selection = self.select(hidden, slots)
        normed = modulated_norm(hidden, modulation, self.mlp_eps).flatten(0, 1)  # (B * N, C)
        update = run_selected(selection, lambda rows: self.feed_forward(rows, gates), normed)  # (B * N, C)
        return gated_update(hidden, modulation.gate, update.view(hidden.shape)), selection.kept

    def select(self, hidden: Tensor, slots: int) -> Selection:
        """Select the tokens whose MLP runs, by the router on the residual (B, N, C)."""
        if not self.sizes.tokens.routed:
            return Selection()
        scores = self.router_out(F.relu(self.router_in(hidden.flatten(0, 1).float()))).view(hidden.shape[:2])  # (B, N)
        return self.sizes.tokens.select(scores, slots)

    def feed_forward(self, rows: Tensor, gates: Gates) -> Tensor:
        """Run the kept MLP groups on normed tokens: (R, C) -> (R, C)."""
        wide = F.gelu(self.fc1(rows, gates.experts), approximate="tanh")  # (R, G' * S)
        # Gates after GELU: for 0 and 1 it is the same, and cheaper.
        update: Tensor = self.fc2(gate_units(wide, gates.groups), gates.experts)  # (R, C)
        return update


class DiTBlock(SlimBlock):
    """Attention, then the MLP."""

    def forward(
        self, hidden: Tensor, modulation: BlockModulation, gates: Gates, slots: int
    ) -> tuple[Tensor, Tensor | None]:
        """Compute (B, N, C) -> (B, N, C), and the kept tokens (B,) where the capacity is limited."""
        normed = modulated_norm(hidden, modulation.attention)  # (B, N, C)
        hidden = gated_update(hidden, modulation.attention.gate, self.attend(normed, gates))  # (B, N, C)
        return self.feed(hidden, modulation.mlp, gates, slots)


class SlimDiT(nn.Module):
    """A DiT at the widths of one segment, without its conditioning network."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__()
        self.segment, self.layout = segment, DiTLayout.of(config, td_lora)
        channels = channels_of(config)
        self.patch_size = config["patch_size"]
        self.grid = config["sample_size"] // self.patch_size
        self.out_channels = config["out_channels"]
        # Opset 20 has no convolution in bf16.
        self.patch = nn.Conv2d(
            config["in_channels"], channels, self.patch_size, stride=self.patch_size, dtype=torch.float32
        )
        self.position = nn.Parameter(torch.empty(1, self.grid**2, channels, dtype=torch.float32))
        paths = lora_paths(td_lora, segment)
        sizes = [BlockSizes.of(config, segment, index, group_size=group_size) for index in range(segment.depth)]
        self.blocks = nn.ModuleList(DiTBlock(own, mlp_eps=config["norm_eps"], td_lora=paths) for own in sizes)
        self.final = nn.Linear(channels, self.patch_size**2 * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute latents (B, C_in, H, W), modulation (B, M), gates (W,), slots (S,) -> sample (B, C_out, H, W).

        Also returns the kept tokens (B, R) of the R blocks whose capacity is limited, if there are any.
        """
        hidden = self.patch(hidden_states).flatten(2).transpose(1, 2) + self.position  # (B, N, C)
        hidden = hidden.to(self.final.weight.dtype)
        parts = self.layout.split(modulation)
        gates = split_gates(self.segment, width_gate, parts.experts)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        for block, own, gate in zip(self.blocks, parts.blocks, gates, strict=True):
            hidden, kept = block(hidden, own, gate, extra)
            if kept is not None:
                counts.append(kept)
        sample = self.unpatchify(modulated_norm(hidden, parts.final))  # (B, C_out, H, W)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def unpatchify(self, normed: Tensor) -> Tensor:
        """Run the final layer: (B, N, C) -> (B, C_out, H, W)."""
        patches = self.final(normed.flatten(0, 1)).float()  # (B * N, P * P * C_out)
        patches = patches.view(-1, self.grid, self.grid, self.patch_size, self.patch_size, self.out_channels)
        pixels = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C_out, grid, P, grid, P)
        side = self.grid * self.patch_size
        return pixels.reshape(-1, self.out_channels, side, side)
