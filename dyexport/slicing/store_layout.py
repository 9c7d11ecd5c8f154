"""Layout of the weight store: one file of tensors that the engines of all segments share.

Segments whose units are a prefix of another's share its bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dyexport.slicing.recipes import Recipe

ALIGNMENT = 4096  # bytes; so that every tensor can be mapped as whole pages


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """Layout of all recipes in one file: ``offsets`` in bytes. Recipes that are not ``owners`` are prefixes of one."""

    offsets: Mapping[Recipe, int]
    owners: tuple[Recipe, ...]
    nbytes: int


def lay_out(recipes: Iterable[Recipe]) -> StoreLayout:
    """Assign offsets; a recipe whose units are a prefix of another's shares its bytes."""
    families: dict[tuple[object, ...], list[Recipe]] = defaultdict(list)
    for recipe in dict.fromkeys(recipes):
        families[recipe.family].append(recipe)
    offsets: dict[Recipe, int] = {}
    owners: list[Recipe] = []
    end = 0
    for family in families.values():
        placed: list[Recipe] = []
        for recipe in sorted(family, key=lambda r: len(r.units), reverse=True):
            owner = next((o for o in placed if o.units[: len(recipe.units)] == recipe.units), None)
            if owner is not None:
                offsets[recipe] = offsets[owner]
                continue
            placed.append(recipe)
            owners.append(recipe)
            offsets[recipe] = end
            end += -(-recipe.nbytes // ALIGNMENT) * ALIGNMENT
    return StoreLayout(offsets=offsets, owners=tuple(owners), nbytes=end)
