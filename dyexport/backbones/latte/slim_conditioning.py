"""Latte's conditioning network: adaLN-single, which depends on t alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.lora import LoraSpec
from dyexport.slicing.modulation import (
    BlockModulation,
    FinalModulation,
    ModulationLayout,
    TimestepConditioning,
    experts_in,
    take_final,
)


def depth_of(config: Mapping[str, Any]) -> int:
    """Return the number of blocks, spatial and temporal."""
    pairs: int = config["num_layers"]
    return 2 * pairs


class LatteModulation(NamedTuple):
    """Modulation that all blocks share, that of the final layer, and the gates of TD-LoRA's experts."""

    shared: BlockModulation
    final: FinalModulation
    experts: Tensor | None


class LatteLayout(ModulationLayout):
    """The vectors that all blocks add their own table to, then the final layer."""

    @classmethod
    def of(cls, config: Mapping[str, Any], td_lora: LoraSpec | None) -> Self:
        """Return the layout of a configuration."""
        return cls(channels=channels_of(config), depth=depth_of(config), experts=experts_in(td_lora))

    @property
    def vectors(self) -> int:
        return 6 + 2

    def pack(self, modulation: LatteModulation) -> Tensor:
        """Pack vectors (R, C) and expert gates (R, L * E) to (R, M)."""
        return self.join([*modulation.shared.vectors, *modulation.final], [], modulation.experts)

    def split(self, modulation: Tensor) -> LatteModulation:
        """Split (B, M) into vectors (B, 1, C) and expert gates (L, E)."""
        vectors = self.vectors_of(modulation)
        return LatteModulation(BlockModulation.take(vectors), take_final(vectors), self.experts_of(modulation))


class LatteConditioning(TimestepConditioning):
    """adaLN-single: the six vectors that all blocks add their own to, and the final layer's two."""

    def __init__(self, config: Mapping[str, Any], *, td_lora: LoraSpec | None) -> None:
        channels = channels_of(config)
        super().__init__(channels, depth_of(config), td_lora)
        self.layout = LatteLayout.of(config, td_lora)
        self.blocks = nn.Linear(channels, 6 * channels)
        self.table = nn.Parameter(torch.empty(2, channels, dtype=torch.float32))

    def forward(self, timestep: Tensor) -> Tensor:
        """Compute t (R,) -> modulation (R, M)."""
        embedding = self.embed(timestep)  # (R, C)
        shared = BlockModulation.of(self.blocks(F.silu(embedding)))
        final = FinalModulation.of((embedding.unsqueeze(1) + self.table).flatten(1))
        return self.layout.pack(LatteModulation(shared, final, self.expert_gates(embedding)))
