"""adaLN modulation: the conditioning network packs it into one tensor, slim networks split that tensor again.

``modulation`` (rows, M) holds vectors of C channels, then single values, then the gates of TD-LoRA's experts. A
backbone's ``ModulationLayout`` is the one place that knows how many there are, and in which order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.lora import LoraSpec
from dyexport.slicing.slim_lora import GateRouters

NORM_EPS = 1e-6  # of the LayerNorm that most adaLN modulate
SINUSOIDS = 256  # channels of a sinusoidal embedding
MAX_PERIOD = 10000  # of the slowest sinusoid


class Modulation(NamedTuple):
    """adaLN-Zero of one branch: (R, C) in the conditioning network, (B, 1, C) in a block. ``scale`` contains its 1."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    @classmethod
    def of(cls, parameters: Tensor) -> Self:
        """Cut a linear layer's output (R, 3 C)."""
        shift, scale, gate = parameters.float().chunk(3, dim=1)
        return cls(shift, scale + 1, gate)


class FinalModulation(NamedTuple):
    """adaLN of the final layer: (R, C) in the conditioning network, (B, 1, C) after it. ``scale`` contains its 1."""

    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, parameters: Tensor) -> Self:
        """Cut a linear layer's output (R, 2 C), shift first."""
        shift, scale = parameters.float().chunk(2, dim=1)
        return cls(shift, scale + 1)


class BlockModulation(NamedTuple):
    """adaLN-Zero of a block's attention and MLP."""

    attention: Modulation
    mlp: Modulation

    @classmethod
    def of(cls, parameters: Tensor) -> Self:
        """Cut a linear layer's output (R, 6 C), attention first."""
        return cls(*(Modulation.of(half) for half in parameters.float().chunk(2, dim=1)))

    @classmethod
    def take(cls, vectors: Iterator[Tensor]) -> Self:
        """Take the next six vectors."""
        return cls(take_modulation(vectors), take_modulation(vectors))

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """The six vectors in the order of ``take``."""
        return (*self.attention, *self.mlp)


def take_modulation(vectors: Iterator[Tensor]) -> Modulation:
    """Take the next three vectors."""
    return Modulation._make(islice(vectors, 3))


def take_final(vectors: Iterator[Tensor]) -> FinalModulation:
    """Take the next two vectors."""
    return FinalModulation._make(islice(vectors, 2))


@dataclass(frozen=True, kw_only=True)
class ModulationLayout(ABC):
    """Order of the columns of ``modulation`` (rows, M). Backbones add ``pack`` and ``split`` with their own types."""

    channels: int  # C
    depth: int  # L
    experts: int = 0  # E of TD-LoRA in each block; 0 without

    @property
    @abstractmethod
    def vectors(self) -> int:
        """Number of vectors of C channels."""

    @property
    def values(self) -> int:
        """Number of single values after the vectors."""
        return 0

    @property
    def size(self) -> int:
        """Number of columns, M."""
        return self._end_of_values + self.depth * self.experts

    @property
    def _end_of_vectors(self) -> int:
        return self.vectors * self.channels

    @property
    def _end_of_values(self) -> int:
        return self._end_of_vectors + self.values

    def join(self, vectors: Iterable[Tensor], values: Iterable[Tensor], experts: Tensor | None) -> Tensor:
        """Concatenate vectors (R, C), values (R, 1) and expert gates (R, L * E) to (R, M)."""
        columns = [*vectors, *values]
        packed = torch.cat(columns if experts is None else [*columns, experts], dim=1)
        assert packed.shape[1] == self.size
        return packed

    def vectors_of(self, modulation: Tensor) -> Iterator[Tensor]:
        """Yield the vectors of (B, M) in order: (B, 1, C) each."""
        return iter(modulation[:, : self._end_of_vectors].unsqueeze(1).split(self.channels, dim=2))

    def values_of(self, modulation: Tensor) -> Iterator[Tensor]:
        """Yield the single values of (B, M) in order: (B, 1) each."""
        return iter(modulation[:, self._end_of_vectors : self._end_of_values].split(1, dim=1))

    def experts_of(self, modulation: Tensor) -> Tensor | None:
        """Return the expert gates (L, E) of (B, M), whose samples share one t; None without TD-LoRA."""
        return modulation[0, self._end_of_values :].view(self.depth, self.experts) if self.experts else None


def experts_in(spec: LoraSpec | None) -> int:
    """Return the number of experts whose gates are in ``modulation``: 0 without TD-LoRA."""
    return 0 if spec is None else spec.experts


def modulated_norm(hidden: Tensor, modulation: Modulation | FinalModulation, eps: float = NORM_EPS) -> Tensor:
    """Compute adaLN, LayerNorm(x) * scale + shift: (B, N, C) -> (B, N, C)."""
    normed = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps)
    return (normed * modulation.scale + modulation.shift).to(hidden.dtype)


def gated_update(hidden: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add an update as adaLN-Zero does: (B, N, C), (B, 1, C), (B, N, C) -> (B, N, C)."""
    return hidden + gate.to(hidden.dtype) * update


def embed_sinusoid(timestep: Tensor, frequencies: Tensor) -> Tensor:
    """Compute (R,), (F,) -> (R, 2 F).

    Frequencies are stored: an ``exp`` of another library would move the phase at t near 1000.
    """
    angles = timestep.unsqueeze(1) * frequencies  # (R, F)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sinusoid_frequencies(shift: float = 0) -> Tensor:
    """Compute the frequencies of diffusers' ``get_timestep_embedding`` to the same bits: (128,).

    ``shift`` is its ``downscale_freq_shift``.
    """
    half = SINUSOIDS // 2
    exponent = -math.log(MAX_PERIOD) * torch.arange(0, half, dtype=torch.float32)
    return torch.exp(exponent / (half - shift))


class TimestepConditioning(nn.Module):
    """The part that conditioning networks share: timestep embedding, and routers of TD-LoRA's experts."""

    def __init__(self, channels: int, depth: int, td_lora: LoraSpec | None) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(SINUSOIDS // 2, dtype=torch.float32))
        self.time_in = nn.Linear(SINUSOIDS, channels)
        self.time_out = nn.Linear(channels, channels)
        self.experts = None if td_lora is None else GateRouters(channels, depth, td_lora.experts)

    def embed(self, timestep: Tensor) -> Tensor:
        """Embed a timestep that has the backbone's factor applied: (R,) -> (R, C)."""
        sinusoid = embed_sinusoid(timestep, self.frequencies).to(self.time_in.weight.dtype)  # (R, 256)
        embedding: Tensor = self.time_out(F.silu(self.time_in(sinusoid)))  # (R, C)
        return embedding

    def expert_gates(self, embedding: Tensor) -> Tensor | None:
        """Compute the gates of all blocks' experts: (R, C) -> (R, L * E); None without TD-LoRA."""
        if self.experts is None:
            return None
        gates: Tensor = self.experts(embedding)
        return gates
