"""Networks cut out of a dense model: slim modules on the meta device, and recipes for their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.backbones import get_slicer
from dyexport.backbones.base import Preset
from dyexport.bundle.plan import EVERY_TOKEN, Segment
from dyexport.bundle.spec import ModelSpec, Precision, Quantization, TokenRouterKind
from dyexport.bundle.tables import TokenStats, UnitOrder, WidthTable
from dyexport.bundle.tensors import TensorSpec
from dyexport.lora import LoraSpec
from dyexport.slicing.merging import merged_recipe, updated_names
from dyexport.slicing.quantizing import quantizable_weights, quantized_recipes
from dyexport.slicing.recipes import Read, Recipe, materialize

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class SliceContext:
    """Context that all networks cut from one model share. ``groups`` is G, the MLP groups of a dense block."""

    spec: ModelSpec
    groups: int
    token_routers: bool

    @classmethod
    def of(cls, spec: ModelSpec, widths: WidthTable, stats: TokenStats | None) -> SliceContext:
        return cls(spec=spec, groups=widths.groups.shape[-1], token_routers=stats is not None)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A network without weights, the recipes of its weights, and its inputs and outputs.

    ``limits`` and ``floors`` bound symbols in the shapes of ``inputs`` from above and below.
    ``ranges`` is the largest input magnitude of each quantized weight, which its export needs.
    """

    module: nn.Module
    recipes: Mapping[str, Recipe]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(recipe.nbytes for recipe in self.recipes.values())

    def load(self, read: Read) -> nn.Module:
        """Return the module with its weights, to run in torch."""
        module = self.module.to_empty(device="cpu")
        module.load_state_dict({name: materialize(recipe, read) for name, recipe in self.recipes.items()})
        return module.eval()


def slice_segment(context: SliceContext, segment: Segment) -> Slice:
    """Cut the slim network of a segment."""
    piece = get_slicer(context.spec.backbone).slice_network(context, segment)
    recipes = piece.recipes
    if segment.merged:
        updated = updated_names(context.spec)
        recipes = {name: merged_recipe(recipe, segment, updated) for name, recipe in recipes.items()}
    if (quantization := context.spec.quantization) is not None:
        recipes = quantized_recipes(recipes, quantizable_weights(piece.module), quantization)
    return replace(piece, recipes=recipes)


def slice_conditioning(context: SliceContext) -> Slice:
    """Cut the conditioning network that all segments share."""
    return get_slicer(context.spec.backbone).slice_conditioning(context)


def spec_of(
    preset: Preset,
    config: Mapping[str, Any],
    td_lora: LoraSpec | None = None,
    precision: Precision = "fp32",
    quantization: Quantization | None = None,
    token_router: TokenRouterKind | None = None,
) -> ModelSpec:
    """Return a bundle's description of a preset's model; ``config`` is the checkpoint's configuration."""
    return ModelSpec(
        name=preset.name,
        backbone=preset.backbone,
        objective=preset.objective,
        timestep_range=preset.timestep_range,
        latent_shape=preset.latent_shape,
        tokens=preset.tokens,
        text_tokens=preset.text_tokens,
        classes=preset.classes,
        pixel_space=preset.pixel_space,
        config=dict(config),
        hub_id=preset.hub_id,
        td_lora=td_lora,
        precision=precision,
        quantization=quantization,
        token_router=token_router,
    )


def dense_segment(spec: ModelSpec, order: UnitOrder) -> Segment:
    """Return the static model as a segment: every unit, every token, the whole range of t.

    With the ``order`` of the slim segments, these share the bytes of the dense weights.
    """
    depth = len(order.heads)
    return Segment(
        start=spec.timestep_range[0],
        end=spec.timestep_range[1],
        heads=order.heads,
        groups=order.groups,
        gated_heads=(False,) * depth,
        gated_groups=(False,) * depth,
        token_paths=(EVERY_TOKEN,) * depth,
        capacities=(spec.tokens,) * depth,
    )


def cut_inputs(context: SliceContext, order: UnitOrder) -> tuple[str, ...]:
    """Return the stock names of the linears whose inputs are cut to the kept units, in order of execution."""
    recipes = slice_segment(context, dense_segment(context.spec, order)).recipes.values()
    sources = [source for recipe in recipes if recipe.kind == "columns" for source in recipe.sources]
    return tuple(dict.fromkeys(source.removesuffix(".weight") for source in sources))


def dense_reader(state: Mapping[str, Tensor], spec: ModelSpec) -> Read:
    """Read from a stock state dict (and ``routers.*``), or else from the tables that few checkpoints store."""
    tables = get_slicer(spec.backbone).tables(spec.config)
    return lambda name: state[name] if name in state else tables[name]


def routed_inputs(segment: Segment) -> tuple[TensorSpec, ...]:
    """Return the inputs that are functions of t: width gates and token slots."""
    inputs = []
    if segment.gate_size:
        inputs.append(TensorSpec(name="width_gate", dtype="float32", shape=(segment.gate_size,)))
    if segment.slot_buckets:
        inputs.append(TensorSpec(name="slots", dtype="float32", shape=("slots",)))
    return tuple(inputs)


def routed_limits(segment: Segment) -> Mapping[str, int]:
    """Return the largest values of symbols in ``routed_inputs``."""
    return {"slots": max(segment.slot_buckets)} if segment.slot_buckets else {}


def outputs_of(segment: Segment) -> tuple[str, ...]:
    """Return the output names of a segment's network."""
    return ("sample", "kept_tokens") if segment.limited_blocks else ("sample",)


def copies(module: nn.Module, sources: Mapping[str, str]) -> dict[str, Recipe]:
    """Return recipes of weights that do not change, from a map of slim names to dense names."""
    state = module.state_dict()
    return {name: recipe_for(state[name], "copy", (source,)) for name, source in sources.items()}


def recipe_for(weight: Tensor, kind: Any, sources: tuple[str, ...], **settings: Any) -> Recipe:
    """Return a recipe whose result has the shape and dtype of ``weight``, which has no memory."""
    return Recipe(kind=kind, sources=sources, shape=tuple(weight.shape), dtype=weight.dtype, **settings)


def linear_names(slim: str, stock: str) -> dict[str, str]:
    """Map the weight and bias of a slim layer to those of a dense one."""
    return {f"{slim}.{kind}": f"{stock}.{kind}" for kind in ("weight", "bias")}


def on_meta(context: SliceContext, make: Any, *args: Any, **settings: Any) -> nn.Module:
    """Make a module without memory for its weights, in the precision of the model.

    Parameters and layers that stay in fp32 are made with ``dtype=torch.float32``: sinusoids, norms inside
    attention, routers, modulation tables, patch embeddings.
    """
    with torch.device("meta"), _default_dtype(DTYPES[context.spec.precision]):
        module: nn.Module = make(*args, **settings)
    return module


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
