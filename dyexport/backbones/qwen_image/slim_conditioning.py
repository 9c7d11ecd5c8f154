"""Qwen-Image's conditioning network: adaLN modulation, which depends on sigma alone. A third of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.backbones.flux.slim_conditioning import DoubleModulation
from dyexport.lora import LoraSpec
from dyexport.slicing.modulation import (
    BlockModulation,
    FinalModulation,
    ModulationLayout,
    TimestepConditioning,
    experts_in,
    take_final,
)

TIMESTEP_SCALE = 1000.0  # of the angles, as diffusers multiplies it: after the frequencies


class QwenImageModulation(NamedTuple):
    """Modulation of every block and of the final layer, and the gates of TD-LoRA's experts."""

    blocks: list[DoubleModulation]
    final: FinalModulation
    experts: Tensor | None


class QwenImageLayout(ModulationLayout):
    """Image, then text of every block; then the final layer."""

    @classmethod
    def of(cls, config: Mapping[str, Any], td_lora: LoraSpec | None) -> Self:
        """Return the layout of a configuration."""
        return cls(channels=channels_of(config), depth=config["num_layers"], experts=experts_in(td_lora))

    @property
    def vectors(self) -> int:
        return 12 * self.depth + 2

    def pack(self, modulation: QwenImageModulation) -> Tensor:
        """Pack vectors (R, C) and expert gates (R, L * E) to (R, M)."""
        vectors = [vector for block in modulation.blocks for stream in block for vector in stream.vectors]
        return self.join([*vectors, *modulation.final], [], modulation.experts)

    def split(self, modulation: Tensor) -> QwenImageModulation:
        """Split (1, M) into vectors (1, 1, C) and expert gates (L, E)."""
        vectors = self.vectors_of(modulation)
        blocks = [
            DoubleModulation(BlockModulation.take(vectors), BlockModulation.take(vectors)) for _ in range(self.depth)
        ]
        return QwenImageModulation(blocks, take_final(vectors), self.experts_of(modulation))


class QwenImageConditioning(TimestepConditioning):
    """adaLN modulation of every block and of the final layer, from sigma."""

    def __init__(self, config: Mapping[str, Any], *, td_lora: LoraSpec | None) -> None:
        channels, depth = channels_of(config), config["num_layers"]
        super().__init__(channels, depth, td_lora)
        self.layout = QwenImageLayout.of(config, td_lora)
        self.image = nn.ModuleList(nn.Linear(channels, 6 * channels) for _ in range(depth))
        self.text = nn.ModuleList(nn.Linear(channels, 6 * channels) for _ in range(depth))
        self.final = nn.Linear(channels, 2 * channels)

    def forward(self, timestep: Tensor) -> Tensor:
        """Compute sigma (R,) -> modulation (R, M)."""
        time = self.embed(timestep)  # (R, C)
        embedding = F.silu(time)  # (R, C)
        scale, shift = self.final(embedding).float().chunk(2, dim=1)  # (R, C)
        modulation = QwenImageModulation(
            blocks=[
                DoubleModulation(BlockModulation.of(image(embedding)), BlockModulation.of(text(embedding)))
                for image, text in zip(self.image, self.text, strict=True)
            ],
            final=FinalModulation(shift, scale + 1),
            experts=self.expert_gates(time),
        )
        return self.layout.pack(modulation)

    def embed(self, timestep: Tensor) -> Tensor:
        """Embed sigma (R,) -> (R, C)."""
        angles = timestep.unsqueeze(1) * self.frequencies * TIMESTEP_SCALE  # (R, 128)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.time_in.weight.dtype)  # (R, 256)
        embedding: Tensor = self.time_out(F.silu(self.time_in(sinusoid)))  # (R, C)
        return embedding
