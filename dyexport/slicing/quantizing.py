"""Which weights of a slim network are quantized, and what their linear layers read.

Those that shrink with width, and Latte's over the text: nearly all of a step's FLOPs. Embedders, norms, the final
layer, token routers, low-rank paths and the conditioning network keep the model's precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from dyexport.bundle.manifest import Quantization
from dyexport.slicing.recipes import Recipe

SCALE = "{weight}_scale"  # stored beside the weight
LINEARS = frozenset(("qkv", "out", "fc1", "fc2", "image_out", "text_out", "query", "key", "value"))


class LinearInput(NamedTuple):
    """What a linear layer reads: the input of a stock ``Linear``, or some of its channels."""

    module: str
    span: tuple[int, int] | None


def is_quantized(weight: str) -> bool:
    """``blocks.0.qkv.weight``, but neither its bias nor ``blocks.0.low_rank.qkv.query.down``."""
    parts = weight.removesuffix(".weight").split(".")
    named = weight.endswith(".weight") or parts[-1] == "out"  # a bare weight in FLUX's single blocks
    return parts[0] == "blocks" and parts[-1] in LINEARS and named and "low_rank" not in parts


def quantized_recipes(recipes: Mapping[str, Recipe], quantization: Quantization) -> dict[str, Recipe]:
    """Recipes of a slice, weights of its linear layers quantized, with their scales beside them."""
    found: dict[str, Recipe] = {}
    for name, recipe in recipes.items():
        if not is_quantized(name):
            found[name] = recipe
            continue
        found[name] = replace(recipe, quantization=quantization)
        found[SCALE.format(weight=name)] = _scales_of(found[name])
    return found


def _scales_of(codes: Recipe) -> Recipe:
    """Columns are of one output each, whichever inputs are kept."""
    if codes.kind == "columns":
        return replace(codes, scales=True, units=(), shape=codes.shape[1:])
    return replace(codes, scales=True, shape=codes.shape[:1])


def linear_inputs(recipes: Mapping[str, Recipe]) -> dict[str, tuple[LinearInput, ...]]:
    """By slim weight; the stock linears of which it is made, such as query, key and value, all read the same."""
    return {
        name: tuple(_input_of(recipe, source) for source in recipe.sources)
        for name, recipe in recipes.items()
        if is_quantized(name)
    }


def _input_of(recipe: Recipe, source: str) -> LinearInput:
    return LinearInput(source.removesuffix(".weight"), recipe.span if recipe.kind == "columns" else None)
