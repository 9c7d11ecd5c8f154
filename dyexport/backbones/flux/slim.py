"""The slim FLUX: double blocks (an image and a text stream), then single blocks (both in one row of tokens).

Everything that depends on sigma, guidance and the pooled text alone is in the conditioning network
(``slim_conditioning``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.backbones.flux.slim_conditioning import DoubleModulation, FluxLayout, RouterWeights
from dyexport.backbones.flux.slim_layers import FeedForward, Projection, Rotary, attend
from dyexport.bundle.plan import Segment
from dyexport.lora import LoraSpec
from dyexport.slicing.linears import SlimLinear, TransposedLinear
from dyexport.slicing.modulation import Modulation, gated_update, modulated_norm
from dyexport.slicing.slim_layers import (
    BlockSizes,
    CompactRouter,
    Gates,
    Selection,
    gate_units,
    run_selected,
    split_gates,
)
from dyexport.slicing.slim_lora import lora_paths


class RoutedBlock(nn.Module):
    """The token router of a block, which scores its image tokens.

    A compact router is a layer of the block; the weights of a published one are made by the conditioning network.
    """

    def __init__(self, sizes: BlockSizes, *, compact_router: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.router = CompactRouter(sizes.channels) if compact_router and sizes.tokens.routed else None

    def scores(self, normed: Tensor, image: Tensor, text: Tensor, published: RouterWeights | None) -> Tensor | None:
        """Compute logits (B, N), or None where every token runs.

        Reads the input of the image MLP (B, N, C), or the streams (B, N, C) and (B, T, C).
        """
        if self.router is not None:
            logits: Tensor = self.router(normed)
            return logits
        return published.scores(image, text) if self.sizes.tokens.routed and published is not None else None


class DoubleBlock(RoutedBlock):
    """Joint attention, then a separate FFN for image and text. Image tokens may skip theirs."""

    def __init__(self, sizes: BlockSizes, td_lora: LoraSpec | None, *, compact_router: bool) -> None:
        super().__init__(sizes, compact_router=compact_router)
        attended = sizes.heads * sizes.head_dim
        self.image = Projection(sizes, td_lora)
        self.text = Projection(sizes, td_lora)
        self.image_out = TransposedLinear(attended, sizes.channels, td_lora)
        self.text_out = TransposedLinear(attended, sizes.channels, td_lora)
        self.image_mlp = FeedForward(sizes, td_lora)
        self.text_mlp = FeedForward(sizes, td_lora)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        modulation: DoubleModulation,
        router: RouterWeights | None,
        rotary: Rotary,
        gates: Gates,
        slots: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute (B, N, C), (B, T, C) -> both streams, and the kept tokens (B,) where the capacity is limited."""
        image_mod, text_mod = modulation
        mixed_image, mixed_text = self.mix(image, text, modulation, rotary, gates)
        image = gated_update(image, image_mod.attention.gate, project(self.image_out, mixed_image, gates))  # (B, N, C)
        text = gated_update(text, text_mod.attention.gate, project(self.text_out, mixed_text, gates))  # (B, T, C)
        normed = modulated_norm(image, image_mod.mlp)  # (B, N, C)
        scores = self.scores(normed, image, text, router)
        selection = Selection() if scores is None else self.sizes.tokens.select(scores, slots)
        update = run_selected(selection, lambda rows: self.image_mlp(rows, gates), normed.flatten(0, 1))  # (B * N, C)
        image = gated_update(image, image_mod.mlp.gate, update.view(image.shape))  # (B, N, C)
        update = self.text_mlp(modulated_norm(text, text_mod.mlp).flatten(0, 1), gates)  # (B * T, C)
        text = gated_update(text, text_mod.mlp.gate, update.view(text.shape))  # (B, T, C)
        return image, text, selection.kept

    def mix(
        self, image: Tensor, text: Tensor, modulation: DoubleModulation, rotary: Rotary, gates: Gates
    ) -> tuple[Tensor, Tensor]:
        """Run joint attention, text before image: (B, N, H' * D), (B, T, H' * D)."""
        from_image = self.image(modulated_norm(image, modulation.image.attention), gates)
        from_text = self.text(modulated_norm(text, modulation.text.attention), gates)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(from_text, from_image, strict=True))
        mixed = attend(query, key, value, rotary, gates)  # (B, T + N, H' * D)
        return mixed[:, text.shape[1] :], mixed[:, : text.shape[1]]


def project(out: TransposedLinear, mixed: Tensor, gates: Gates) -> Tensor:
    """Run the output projection of attention: (B, N, H' * D) -> (B, N, C)."""
    update: Tensor = out(mixed.flatten(0, 1), gates.experts)  # (B * N, C)
    return update.view(*mixed.shape[:2], -1)


class SingleBlock(RoutedBlock):
    """Attention and MLP in parallel with one output projection. A skipped image token misses both updates.

    The stock block's ``proj_out`` is cut into ``out``, which reads attention, and ``fc2``, which reads the MLP.
    """

    def __init__(self, sizes: BlockSizes, td_lora: LoraSpec | None, *, compact_router: bool) -> None:
        super().__init__(sizes, compact_router=compact_router)
        self.projection = Projection(sizes, td_lora)
        self.fc1 = SlimLinear(sizes.channels, sizes.hidden, td_lora)
        self.out = TransposedLinear(sizes.heads * sizes.head_dim, sizes.channels, td_lora, bias=False)
        self.fc2 = TransposedLinear(sizes.hidden, sizes.channels, td_lora)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        modulation: Modulation,
        router: RouterWeights | None,
        rotary: Rotary,
        gates: Gates,
        slots: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute (B, N, C), (B, T, C) -> both streams, and the kept tokens (B,) where the capacity is limited."""
        words = text.shape[1]
        tokens = torch.cat([text, image], dim=1)  # (B, T + N, C)
        normed = modulated_norm(tokens, modulation)  # (B, T + N, C)
        query, key, value = self.projection(normed, gates)  # (B, H', T + N, D)
        mixed = attend(query, key, value, rotary, gates)  # (B, T + N, H' * D)
        selection, kept = Selection(), None
        scores = self.scores(normed[:, words:], image, text, router)
        if scores is not None:
            selection, kept = self.select(scores, words, slots)
        update = run_selected(
            selection,
            lambda rows, attended: self.update(rows, attended, gates),
            normed.flatten(0, 1),
            mixed.flatten(0, 1),
        )  # (B * (T + N), C)
        tokens = gated_update(tokens, modulation.gate, update.view(tokens.shape))
        return tokens[:, words:], tokens[:, :words], kept

    def update(self, rows: Tensor, attended: Tensor, gates: Gates) -> Tensor:
        """Run the MLP on normed tokens (R, C), and project it with attention (R, H' * D): (R, C)."""
        wide = F.gelu(self.fc1(rows, gates.experts), approximate="tanh")  # (R, G' * S)
        from_mlp = self.fc2(gate_units(wide, gates.groups), gates.experts)  # (R, C)
        update: Tensor = self.out(attended, gates.experts, addend=from_mlp)  # (R, C)
        return update

    def select(self, scores: Tensor, words: int, slots: int) -> tuple[Selection, Tensor | None]:
        """Select every text token, and image tokens by their scores (B, N); count the image tokens kept (B,)."""
        always = scores.abs().amax(1, keepdim=True).expand(-1, words) + 1  # on, and ahead of every image token
        selection = self.sizes.tokens.select(torch.cat([always, scores], dim=1), slots, always_on=words)
        return selection, None if selection.kept is None else selection.kept - words


class SlimFlux(nn.Module):
    """A FLUX at the widths of one segment, without its conditioning network."""

    def __init__(
        self,
        config: Mapping[str, Any],
        segment: Segment,
        *,
        group_size: int,
        published_routers: bool,
        td_lora: LoraSpec | None,
        text_tokens: int,
    ) -> None:
        super().__init__()
        self.segment = segment
        self.layout = FluxLayout.of(config, published_routers=published_routers, td_lora=td_lora)
        channels, doubles = channels_of(config), config["num_layers"]
        self.axes = tuple(size // 2 for size in config["axes_dims_rope"])
        self.image_in = nn.Linear(config["in_channels"], channels)
        self.text_in = nn.Linear(config["joint_attention_dim"], channels)
        self.rotary = nn.Parameter(torch.empty(config["attention_head_dim"] // 2, dtype=torch.float32))
        self.blocks = nn.ModuleList()
        for index in range(segment.depth):
            double = index < doubles
            always_on = 0 if double else text_tokens
            sizes = BlockSizes.of(config, segment, index, group_size=group_size, always_on=always_on)
            kind = DoubleBlock if double else SingleBlock
            self.blocks.append(kind(sizes, lora_paths(td_lora, segment), compact_router=not published_routers))
        self.final = nn.Linear(channels, config.get("out_channels") or config["in_channels"])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute latents (B, N, C_in), text (B, T, J), modulation (B, M) -> sample (B, N, C_out).

        ``img_ids`` (N, 3) and ``txt_ids`` (T, 3) are positions, ``width_gate`` is (W,), ``slots`` (S,). Also returns
        the kept tokens (B, R) of the R blocks whose capacity is limited, if there are any.
        """
        dtype = self.image_in.weight.dtype
        image, text = self.image_in(hidden_states.to(dtype)), self.text_in(encoder_hidden_states.to(dtype))  # (B, ., C)
        rotary = self.angles(torch.cat([txt_ids, img_ids]))
        parts = self.layout.split(modulation)
        routers: Sequence[RouterWeights | None] = parts.routers or (None,) * self.segment.depth
        gates = split_gates(self.segment, width_gate, parts.experts)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        vectors = [*parts.doubles, *parts.singles]
        for block, own, router, gate in zip(self.blocks, vectors, routers, gates, strict=True):
            image, text, kept = block(image, text, own, router, rotary, gate, extra)
            if kept is not None:
                counts.append(kept)
        sample = self.final(modulated_norm(image, parts.final)).float()  # (B, N, C_out)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def angles(self, ids: Tensor) -> Rotary:
        """Compute rotary angles of positions (S, 3); the channels of a head are split among the three axes."""
        parts = zip(ids.unsqueeze(2).unbind(1), self.rotary.split(self.axes), strict=True)
        angles = torch.cat([position * frequencies for position, frequencies in parts], dim=1)  # (S, D / 2)
        return Rotary(angles.cos(), angles.sin())
