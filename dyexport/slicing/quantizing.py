"""Weights of a slim network that are quantized, and the inputs of their linear layers.

Quantized are the ``BlockLinear``s: attention and MLP of every block, nearly all of a step's FLOPs. Embedders, norms,
the final layer, token routers, low-rank paths and the conditioning network keep the model's precision.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from dyexport.bundle.spec import Quantization
from dyexport.slicing.linears import BlockLinear
from dyexport.slicing.recipes import Recipe

if TYPE_CHECKING:
    from dyexport.slicing.slicer import Slice

SCALE = "{weight}_scale"  # name of a weight's scales in the store


class LinearInput(NamedTuple):
    """The input of a stock ``Linear``, or the channels in ``span`` of it."""

    module: str
    span: tuple[int, int] | None


def quantizable_weights(module: nn.Module) -> frozenset[str]:
    """Return the names of all weights that quantization applies to."""
    return frozenset(f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, BlockLinear))


def quantized_recipes(
    recipes: Mapping[str, Recipe], weights: Collection[str], quantization: Quantization
) -> dict[str, Recipe]:
    """Quantize ``weights`` of a slice's recipes, and add a recipe for the scales of each."""
    quantized: dict[str, Recipe] = {}
    for name, recipe in recipes.items():
        if name not in weights:
            quantized[name] = recipe
            continue
        quantized[name] = replace(recipe, quantization=quantization)
        quantized[SCALE.format(weight=name)] = _scales_of(quantized[name])
    return quantized


def _scales_of(codes: Recipe) -> Recipe:
    """Return the recipe of one scale per output channel. Columns belong to one output, whichever inputs are kept."""
    if codes.kind == "columns":
        return replace(codes, scales=True, units=(), shape=codes.shape[1:])
    return replace(codes, scales=True, shape=codes.shape[:1])


def linear_inputs(slice_: Slice) -> dict[str, tuple[LinearInput, ...]]:
    """Return the inputs of every quantizable weight, one for each stock layer that it is made of.

    The stock layers of one weight, such as query, key and value, all read the same.
    """
    weights = quantizable_weights(slice_.module)
    return {
        name: tuple(_input_of(recipe, source) for source in recipe.sources)
        for name, recipe in slice_.recipes.items()
        if name in weights
    }


def _input_of(recipe: Recipe, source: str) -> LinearInput:
    return LinearInput(source.removesuffix(".weight"), recipe.span if recipe.kind == "columns" else None)
