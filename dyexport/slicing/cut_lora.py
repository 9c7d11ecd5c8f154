"""Recipes of TD-LoRA's low-rank paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dyexport.lora import LoraSpec
from dyexport.models.td_lora import key_of
from dyexport.slicing.recipes import Recipe
from dyexport.slicing.slicer import linear_names, recipe_for


def router_names(slim: str, depth: int) -> dict[str, str]:
    """Map the names of ``GateRouters`` in a slim module to dense names."""
    names: dict[str, str] = {}
    for index in range(depth):
        names |= linear_names(f"{slim}.blocks.{index}", f"td_lora.blocks.{index}.router")
    return names


class PathCut:
    """Recipes of one block's paths."""

    def __init__(self, spec: LoraSpec, index: int, weights: Mapping[str, Tensor]) -> None:
        self.spec, self.index, self.weights = spec, index, weights
        self.recipes: dict[str, Recipe] = {}

    def narrow_out(self, slim: str, linear: str, *, scale: float = 1.0, **units: Any) -> None:
        """Add a path whose outputs are cut to the kept units; ``scale`` is the factor of the linear itself."""
        self._add(f"{slim}.down", linear, "down", "copy")
        self._add(f"{slim}.up", linear, "up", "rows", scale=scale * self.spec.scale, **units)

    def narrow_in(self, slim: str, linear: str, **units: Any) -> None:
        """Add a path whose inputs are cut to the kept units."""
        self._add(f"{slim}.down", linear, "down", "rows", scale=self.spec.scale, **units)
        self._add(f"{slim}.up", linear, "up", "copy")

    def _add(self, slim: str, linear: str, factor: str, kind: str, **settings: Any) -> None:
        name = f"blocks.{self.index}.{slim}"
        source = f"td_lora.blocks.{self.index}.layers.{key_of(linear)}.{factor}"
        self.recipes[name] = recipe_for(self.weights[name], kind, (source,), **settings)
