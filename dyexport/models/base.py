"""What dyexport must know of a backbone to make it dynamic; one adapter per architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from dyexport.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BlockSites:
    """Where masks attach in one stock block. The mask is a multiplication, so slicing there is exact.

    ``attention_out``  Linear whose input (..., H * head_dim) is multiplied by the head mask
    ``mlp_in``         Linear whose output (..., G * group_size) is multiplied by the group mask,
                       before GELU (GELU(0) = 0)
    ``mlp``            module whose output (B, N, C) is multiplied by the token mask
    ``token_input``    module whose input (B, N, C), the raw residual, the token router reads
    """

    attention_out: nn.Linear
    mlp_in: nn.Linear
    mlp: nn.Module
    token_input: nn.Module


class BackboneAdapter(Protocol):
    """Everything architecture-specific on the build side, as functions of a stock diffusers module."""

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """A stock module of that configuration, shared embedders shared, with torch's default initialisation."""

    def initialise(self, backbone: Any) -> None:
        """Overwrite the weights with the published initialisation for training from scratch."""

    def share_embedders(self, backbone: Any) -> None:
        """Make what blocks share in the architecture one module; raises ``CheckpointError`` where copies differ."""

    def sites(self, backbone: Any) -> list[BlockSites]:
        """Mask sites of every block, in order of execution."""

    def timestep_embedding(self, backbone: Any, timestep: Tensor) -> Tensor:
        """What width routers see, a function of t alone: (B,) -> (B, C)."""

    def permute_units(self, backbone: Any, block: int, heads: Tensor, groups: Tensor) -> None:
        """Reorder heads (H,) and MLP groups (G,) of a block in place; the function computed is unchanged."""


_ADAPTERS = {"dit": "dyexport.models.dit:DiTAdapter", "sit": "dyexport.models.dit:DiTAdapter"}


def get_adapter(backbone: str) -> BackboneAdapter:
    """The adapter for a backbone kind; ``sit`` shares DiT's network and differs only in its objective."""
    if backbone not in _ADAPTERS:
        raise UsageError(f"unknown backbone {backbone!r}; known: {', '.join(_ADAPTERS)}")
    module, _, name = _ADAPTERS[backbone].partition(":")
    adapter: BackboneAdapter = getattr(import_module(module), name)()
    return adapter
