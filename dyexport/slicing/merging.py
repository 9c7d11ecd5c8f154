"""TD-LoRA merged into the weights of a segment, at the mean gates of its interval.

Each merged segment then has weights of its own: K of them take K times the bytes of the blocks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from torch import Tensor

from dyexport.backbones.basic_transformer_block import LINEARS
from dyexport.backbones.flux.masked import DOUBLE_LINEARS, SINGLE_LINEARS
from dyexport.bundle.manifest import Segment
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.td_lora import LowRank
from dyexport.slicing.recipes import Read, Recipe

PREFIX = "merged"
UPDATED = tuple(f".{name}.weight" for name in (*LINEARS, *DOUBLE_LINEARS, *SINGLE_LINEARS))


def merged_recipe(recipe: Recipe, segment: Segment) -> Recipe:
    """The same, reading weights merged for a segment: ``merged:START:END:NAME``, as ``merging_reader`` knows them."""
    if not recipe.sources[0].endswith(UPDATED):
        return recipe
    sources = tuple(f"{PREFIX}:{segment.start!r}:{segment.end!r}:{source}" for source in recipe.sources)
    return replace(recipe, sources=sources)


def merging_reader(model: DynamicTransformer, read: Read) -> Read:
    """``read`` with merged weights too: each is made when it is asked for, W + mean over t of sum_i g_i(t) B_i A_i."""
    updates = _updates(model)
    gates = cache(model.mean_lora_gates)

    def merging(name: str) -> Tensor:
        if not name.startswith(f"{PREFIX}:"):
            return read(name)
        _, start, end, stock = name.split(":")
        block, layer = updates[stock]
        return read(stock) + layer.change(gates(float(start), float(end))[block]).detach()

    return merging


def _updates(model: DynamicTransformer) -> dict[str, tuple[int, LowRank]]:
    """Every updated weight by its stock name: its block, and its update."""
    if model.td_lora is None:
        return {}
    names = {module: name for name, module in model.backbone.named_modules()}
    blocks = zip(model.adapter.blocks(model.backbone), model.td_lora.block_loras, strict=True)
    return {
        f"{names[linear]}.weight": (index, lora.layer(name))
        for index, (block, lora) in enumerate(blocks)
        for name, linear in model.lora_linears(block).items()
    }
