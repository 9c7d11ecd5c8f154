"""TD-LoRA merged into the weights of a segment, at the mean gates of its interval.

Each merged segment then has weights that no other shares: K of them take K times the bytes of the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Adapter
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import ModelSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.slicing.recipes import Read, Recipe

PREFIX = "merged"


def merged_recipe(recipe: Recipe, segment: Segment, updated: Collection[str]) -> Recipe:
    """Read weights merged for a segment instead of those in ``updated``.

    Their names are ``merged:START:END:NAME``, as ``merging_reader`` knows them.
    """
    if recipe.sources[0] not in updated:
        return recipe
    sources = tuple(f"{PREFIX}:{segment.start!r}:{segment.end!r}:{source}" for source in recipe.sources)
    return replace(recipe, sources=sources)


def merging_reader(model: DynamicTransformer, read: Read) -> Read:
    """Extend ``read`` by merged weights, made when they are read: W + mean over t of sum_i g_i(t) B_i A_i."""
    places = {} if model.td_lora is None else updated_weights(model.adapter, model.backbone)
    gates = cache(model.mean_lora_gates)

    def merging(name: str) -> Tensor:
        if not name.startswith(f"{PREFIX}:"):
            return read(name)
        _, start, end, stock = name.split(":")
        block, linear = places[stock]
        assert model.td_lora is not None
        update = model.td_lora.block_loras[block].layer(linear).change(gates(float(start), float(end))[block])
        return read(stock) + update.detach()

    return merging


def updated_weights(adapter: Adapter, backbone: nn.Module) -> dict[str, tuple[int, str]]:
    """Return the weights that TD-LoRA updates, by stock name: their block, and their linear's name in it."""
    names = {module: name for name, module in backbone.named_modules()}
    return {
        f"{names[block]}.{target}.weight": (index, target)
        for index, block in enumerate(adapter.blocks(backbone))
        for target in adapter.lora_targets(block)
    }


def updated_names(spec: ModelSpec) -> frozenset[str]:
    """Return the stock names of the weights that TD-LoRA updates in a model."""
    return _updated_names(spec.backbone, json.dumps(spec.config))


@lru_cache(maxsize=4)
def _updated_names(backbone: str, config: str) -> frozenset[str]:
    adapter = get_adapter(backbone)
    with torch.device("meta"):
        return frozenset(updated_weights(adapter, adapter.build(json.loads(config))))
