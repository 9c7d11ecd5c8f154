"""The slim Qwen-Image: blocks of an image and a text stream, with joint attention that sees no padding of the text.

Everything that depends on sigma alone is in the conditioning network (``slim_conditioning``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.backbones.flux.slim import project
from dyexport.backbones.flux.slim_conditioning import DoubleModulation
from dyexport.backbones.flux.slim_layers import FeedForward, Projection, Rotary, rms_norm
from dyexport.backbones.qwen_image.slim_conditioning import QwenImageLayout
from dyexport.bundle.plan import Segment
from dyexport.lora import LoraSpec
from dyexport.slicing.linears import TransposedLinear
from dyexport.slicing.modulation import gated_update, modulated_norm
from dyexport.slicing.slim_layers import BlockSizes, Gates, Selection, gate_heads, run_selected, split_gates
from dyexport.slicing.slim_lora import lora_paths

MASKED = 30000.0  # subtracted from logits of padding; fp16 holds it, and exp of it is 0 in any format


class Block(nn.Module):
    """Joint attention, then a separate MLP for image and text. Image tokens may skip theirs.

    Nothing reads the text after the last block, so that one leaves it as it is.
    """

    def __init__(self, sizes: BlockSizes, td_lora: LoraSpec | None, *, last: bool) -> None:
        super().__init__()
        self.sizes = sizes
        attended = sizes.heads * sizes.head_dim
        self.image = Projection(sizes, td_lora)
        self.text = Projection(sizes, td_lora)
        self.image_out = TransposedLinear(attended, sizes.channels, td_lora)
        self.image_mlp = FeedForward(sizes, td_lora)
        self.text_out = None if last else TransposedLinear(attended, sizes.channels, td_lora)
        self.text_mlp = None if last else FeedForward(sizes, td_lora)
        if sizes.tokens.routed:
            bottleneck = max(sizes.channels // 16, 1)
            self.router_in = nn.Linear(sizes.channels, bottleneck, dtype=torch.float32)
            self.router_out = nn.Linear(bottleneck, 1, dtype=torch.float32)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        modulation: DoubleModulation,
        rotary: Rotary,
        bias: Tensor,
        gates: Gates,
        slots: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute (B, N, C), (B, T, C) -> both streams, and the kept tokens (B,) where the capacity is limited."""
        mixed_image, mixed_text = self.mix(image, text, modulation, rotary, bias, gates)
        update = project(self.image_out, mixed_image, gates)  # (B, N, C)
        image = gated_update(image, modulation.image.attention.gate, update)  # (B, N, C)
        normed = modulated_norm(image, modulation.image.mlp)  # (B, N, C)
        selection = self.select(normed, slots)
        update = run_selected(selection, lambda rows: self.image_mlp(rows, gates), normed.flatten(0, 1))  # (B * N, C)
        image = gated_update(image, modulation.image.mlp.gate, update.view(image.shape))  # (B, N, C)
        if self.text_out is None or self.text_mlp is None:
            return image, text, selection.kept
        update = project(self.text_out, mixed_text, gates)  # (B, T, C)
        text = gated_update(text, modulation.text.attention.gate, update)  # (B, T, C)
        update = self.text_mlp(modulated_norm(text, modulation.text.mlp).flatten(0, 1), gates)  # (B * T, C)
        text = gated_update(text, modulation.text.mlp.gate, update.view(text.shape))  # (B, T, C)
        return image, text, selection.kept

    def mix(
        self, image: Tensor, text: Tensor, modulation: DoubleModulation, rotary: Rotary, bias: Tensor, gates: Gates
    ) -> tuple[Tensor, Tensor]:
        """Run joint attention, text before image, with a bias (B, 1, 1, S): (B, N, H' * D), (B, T, H' * D)."""
        from_image = self.image(modulated_norm(image, modulation.image.attention), gates)
        from_text = self.text(modulated_norm(text, modulation.text.attention), gates)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(from_text, from_image, strict=True))
        query, key = rotary.turn(query).to(value.dtype), rotary.turn(key).to(value.dtype)  # (B, H', S, D)
        # The query's norm has scaled it.
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(value.dtype), scale=1.0)
        mixed = gate_heads(mixed, gates.heads).transpose(1, 2).flatten(2)  # (B, S, H' * D)
        return mixed[:, text.shape[1] :], mixed[:, : text.shape[1]]

    def select(self, normed: Tensor, slots: int) -> Selection:
        """Select the image tokens whose MLP runs, by the router on the MLP's input (B, N, C)."""
        if not self.sizes.tokens.routed:
            return Selection()
        rows = normed.flatten(0, 1).float()  # (B * N, C)
        scores = self.router_out(F.relu(self.router_in(rows))).view(normed.shape[:2])  # (B, N)
        return self.sizes.tokens.select(scores, slots)


def token_positions(img_shapes: Tensor, image_tokens: int, text_tokens: int) -> Tensor:
    """Compute the positions of text and image tokens as diffusers' ``QwenEmbedRope`` has them: (T + N, 3).

    ``img_shapes`` (3,) are frames, rows and columns. Rows and columns count from the center of the picture; text goes
    on where the larger side ends, on all three axes alike.
    """
    _, rows, columns = img_shapes.float().unbind(0)
    above, left = (rows / 2).floor(), (columns / 2).floor()
    index = torch.arange(image_tokens, device=img_shapes.device).float()  # (N,)
    frame, within = _divide(index, rows * columns)
    row, column = _divide(within, columns)
    image = torch.stack([frame, row - (rows - above), column - (columns - left)], dim=1)  # (N, 3)
    words = torch.arange(text_tokens, device=img_shapes.device).float()  # (T,)
    text = (words + torch.maximum(above, left)).unsqueeze(1).expand(-1, 3)  # (T, 3)
    return torch.cat([text, image])


def _divide(index: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder of whole numbers; half a number keeps a rounded quotient on its side."""
    quotient = ((index + 0.5) / size).floor()
    return quotient, index - quotient * size


class SlimQwenImage(nn.Module):
    """A Qwen-Image at the widths of one segment, without its conditioning network."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__()
        self.segment, self.layout = segment, QwenImageLayout.of(config, td_lora)
        channels = channels_of(config)
        self.axes = tuple(size // 2 for size in config["axes_dims_rope"])
        self.image_in = nn.Linear(config["in_channels"], channels)
        self.text_norm = nn.Parameter(torch.empty(config["joint_attention_dim"], dtype=torch.float32))
        self.text_in = nn.Linear(config["joint_attention_dim"], channels)
        self.rotary = nn.Parameter(torch.empty(config["attention_head_dim"] // 2, dtype=torch.float32))
        paths = lora_paths(td_lora, segment)
        sizes = [BlockSizes.of(config, segment, index, group_size=group_size) for index in range(segment.depth)]
        self.blocks = nn.ModuleList(
            Block(own, paths, last=index == segment.depth - 1) for index, own in enumerate(sizes)
        )
        self.final = nn.Linear(channels, config["in_channels"])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        modulation: Tensor,
        img_shapes: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute latents (B, N, C_in), text (B, T, J), its mask (B, T), modulation (1, M) -> sample (B, N, C_in).

        ``img_shapes`` (3,) are frames, rows and columns of the N image tokens, ``width_gate`` is (W,), ``slots`` (S,).
        Also returns the kept tokens (B, R) of the R blocks whose capacity is limited, if there are any.
        """
        dtype = self.image_in.weight.dtype
        image = self.image_in(hidden_states.to(dtype))  # (B, N, C)
        text = self.text_in(rms_norm(encoder_hidden_states, self.text_norm).to(dtype))  # (B, T, C)
        rotary = self.angles(token_positions(img_shapes, image.shape[1], text.shape[1]))
        bias = F.pad((encoder_hidden_states_mask - 1) * MASKED, (0, image.shape[1]))  # (B, T + N)
        bias = bias.unsqueeze(1).unsqueeze(1)  # (B, 1, 1, T + N)
        parts = self.layout.split(modulation)
        gates = split_gates(self.segment, width_gate, parts.experts)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        for block, own, gate in zip(self.blocks, parts.blocks, gates, strict=True):
            image, text, kept = block(image, text, own, rotary, bias, gate, extra)
            if kept is not None:
                counts.append(kept)
        sample = self.final(modulated_norm(image, parts.final)).float()  # (B, N, C_in)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def angles(self, ids: Tensor) -> Rotary:
        """Compute rotary angles of positions (S, 3); the channels of a head are split among the three axes."""
        parts = zip(ids.unsqueeze(2).unbind(1), self.rotary.split(self.axes), strict=True)
        angles = torch.cat([position * frequencies for position, frequencies in parts], dim=1)  # (S, D / 2)
        return Rotary(angles.cos(), angles.sin())
