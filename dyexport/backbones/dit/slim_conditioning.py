"""DiT's conditioning network: everything that depends on t and the class label alone, a third of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

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


class DiTModulation(NamedTuple):
    """Modulation of every block and of the final layer, and the gates of TD-LoRA's experts."""

    blocks: list[BlockModulation]
    final: FinalModulation
    experts: Tensor | None


class DiTLayout(ModulationLayout):
    """Attention and MLP of every block, then the final layer."""

    @classmethod
    def of(cls, config: Mapping[str, Any], td_lora: LoraSpec | None) -> Self:
        """Return the layout of a configuration."""
        return cls(channels=channels_of(config), depth=config["num_layers"], experts=experts_in(td_lora))

    @property
    def vectors(self) -> int:
        return 6 * self.depth + 2

    def pack(self, modulation: DiTModulation) -> Tensor:
        """Pack vectors (R, C) and expert gates (R, L * E) to (R, M)."""
        vectors = [vector for block in modulation.blocks for vector in block.vectors]
        return self.join([*vectors, *modulation.final], [], modulation.experts)

    def split(self, modulation: Tensor) -> DiTModulation:
        """Split (B, M) into vectors (B, 1, C) and expert gates (L, E)."""
        vectors = self.vectors_of(modulation)
        blocks = [BlockModulation.take(vectors) for _ in range(self.depth)]
        return DiTModulation(blocks, take_final(vectors), self.experts_of(modulation))


class DiTConditioning(TimestepConditioning):
    """adaLN-Zero modulation of every block and of the final layer, from t and the class label."""

    def __init__(self, config: Mapping[str, Any], *, td_lora: LoraSpec | None) -> None:
        channels = channels_of(config)
        super().__init__(channels, config["num_layers"], td_lora)
        self.layout = DiTLayout.of(config, td_lora)
        self.labels = nn.Embedding(config["num_embeds_ada_norm"] + 1, channels)
        self.blocks = nn.ModuleList(nn.Linear(channels, 6 * channels) for _ in range(config["num_layers"]))
        self.final = nn.Linear(channels, 2 * channels)

    def forward(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Compute t (R,), labels (R,) -> modulation (R, M)."""
        time = self.embed(timestep)  # (R, C)
        embedding = F.silu(time + self.labels(class_labels))  # (R, C)
        blocks = [BlockModulation.of(block(embedding)) for block in self.blocks]
        final = FinalModulation.of(self.final(embedding))
        return self.layout.pack(DiTModulation(blocks, final, self.expert_gates(time)))
