"""Quantized weights: codes times scales are the weights, and networks cut from one weight share its codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dyexport.backbones.base import Preset
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import Quantization
from dyexport.presets import get_preset
from dyexport.slicing.quantizing import SCALE, linear_inputs, quantized_recipes
from dyexport.slicing.recipes import QMAX, Recipe, materialize
from dyexport.slicing.slicer import Slice, SliceContext, slice_segment, spec_of
from dyexport.slicing.store_layout import lay_out
from tests.pipeline.tiny import TINY

KINDS: list[Quantization] = ["int8", "fp8"]
PRESETS: dict[str, Preset] = {
    "sit": TINY,
    "flux": replace(get_preset("flux-tiny"), double_blocks=1, single_blocks=1),
    "latte": replace(get_preset("latte-tiny"), pairs=1),
}


def noise(name: str) -> Tensor:
    """A weight whose rows and columns are of very different size."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    sizes = torch.logspace(-2, 2, 64)
    return torch.randn(64, 64, generator=generator) * sizes[:, None] * sizes[torch.randperm(64, generator=generator)]


RECIPES = {
    "rows": Recipe(kind="rows", sources=("w",), shape=(32, 64), units=(3, 0), unit_size=16),
    "columns": Recipe(kind="columns", sources=("w",), shape=(16, 64), units=(1, 0), unit_size=8, span=(16, 48)),
    "qkv": Recipe(kind="qkv", sources=("q", "k", "v"), shape=(48, 64), units=(2,), unit_size=16, scale=0.25),
    "halves": Recipe(kind="qkv", sources=("q", "k", "v"), shape=(96, 64), units=(2, 1), unit_size=16, halves=True),
    "copy": Recipe(kind="copy", sources=("w",), shape=(64, 64)),
}


def stored(recipe: Recipe, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Codes and scales, as a weight of this recipe is stored."""
    recipes = quantized_recipes({"weight": recipe}, {"weight"}, quantization)
    codes, scales = recipes["weight"], recipes[SCALE.format(weight="weight")]
    made = materialize(codes, noise), materialize(scales, noise)
    assert (made[0].nbytes, made[1].nbytes) == (codes.nbytes, scales.nbytes)
    assert (made[0].shape, made[1].shape) == (codes.shape, scales.shape)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_codes_times_scales_are_the_weight(name: str, quantization: Quantization, dtype: torch.dtype) -> None:
    recipe = replace(RECIPES[name], dtype=dtype)
    codes, scales = stored(recipe, quantization)
    scale = scales.float().unsqueeze(0 if recipe.kind == "columns" else 1)
    exact = materialize(replace(recipe, dtype=torch.float32), noise)
    # What is beyond the largest code only is so because scales are rounded.
    close = exact.abs() * (torch.finfo(dtype).eps + (0 if quantization == "int8" else 2**-4))
    close = close + scale * (0.5 if quantization == "int8" else 2**-10)
    assert ((codes.float() * scale - exact).abs() <= close * 1.001).all()
    assert codes.float().abs().max() > 0.9 * QMAX[quantization] or recipe.kind == "columns"


@pytest.mark.parametrize("quantization", KINDS)
def test_a_row_of_zeros_is_zero(quantization: Quantization) -> None:
    recipe = replace(RECIPES["rows"], dtype=torch.float16)
    recipes = quantized_recipes({"weight": recipe}, {"weight"}, quantization)
    for recipe in recipes.values():
        made = materialize(recipe, lambda name: torch.zeros(64, 64)).float()
        assert made.isfinite().all()
        assert (made > 0).all() if recipe.scales else (made == 0).all()


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(("name", "size"), [("rows", 16), ("columns", 8)])
def test_fewer_units_are_a_prefix(name: str, size: int, quantization: Quantization) -> None:
    """Though what is cut away along the columns has by far the largest weights of each output."""
    wide = RECIPES[name]
    narrow = replace(wide, units=wide.units[:1], shape=(size, 64))
    (codes, scales), (fewer, fewer_scales) = stored(wide, quantization), stored(narrow, quantization)
    assert torch.equal(codes[:size].float(), fewer.float())
    assert torch.equal(scales[: len(fewer_scales)], fewer_scales)


def first_units(backbone: str, count: int, quantization: Quantization | None, **settings: Any) -> Slice:
    """The first ``count`` heads and groups of every block."""
    preset = PRESETS[backbone]
    spec = spec_of(preset, preset.transformer_config(), quantization=quantization, **settings)
    units = (tuple(range(count)),) * preset.depth
    segment = Segment(
        start=preset.timestep_range[0],
        end=preset.timestep_range[1],
        heads=units,
        groups=units,
        gated_heads=(False,) * preset.depth,
        gated_groups=(False,) * preset.depth,
        token_paths=("masked",) * preset.depth,
        capacities=(preset.tokens,) * preset.depth,
    )
    return slice_segment(SliceContext(spec=spec, groups=preset.heads, token_routers=True), segment)


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("backbone", PRESETS)
def test_networks_of_one_weight_share_its_codes(backbone: str, quantization: Quantization) -> None:
    wide, narrow = (first_units(backbone, count, quantization) for count in (3, 2))
    alone = lay_out(wide.recipes.values())
    both = lay_out([*narrow.recipes.values(), *wide.recipes.values()])
    assert both.nbytes == alone.nbytes
    stored_in_eight_bits = [name for name, recipe in narrow.recipes.items() if recipe.quantization]
    assert len(stored_in_eight_bits) >= 8 * PRESETS[backbone].depth
    for name in stored_in_eight_bits:
        assert both.offsets[narrow.recipes[name]] == both.offsets[wide.recipes[name]]


@pytest.mark.parametrize("backbone", PRESETS)
def test_all_linears_of_blocks_and_nothing_else(backbone: str) -> None:
    plain, quantized = first_units(backbone, 2, None), first_units(backbone, 2, "int8")
    linears = linear_inputs(plain)
    assert {name for name, recipe in quantized.recipes.items() if recipe.quantization and not recipe.scales} == set(
        linears
    )
    left = {
        name
        for name, recipe in plain.recipes.items()
        if name not in linears and name.startswith("blocks.") and len(recipe.shape) == 2
    }
    assert {name.split(".")[2] for name in left} <= {"router_in", "router_out", "table"}
    assert quantized.nbytes < 0.5 * plain.nbytes


def test_a_linear_of_flux_reads_some_of_its_channels() -> None:
    linears = linear_inputs(first_units("flux", 2, "int8"))
    (out,), (fc2,) = linears["blocks.1.out.weight"], linears["blocks.1.fc2.weight"]
    assert out.module == fc2.module == "single_transformer_blocks.0.proj_out"
    assert out.span is not None
    assert fc2.span is not None
    assert (out.span[0], out.span[1], fc2.span[0]) == (0, fc2.span[0], out.span[1])
    assert [part.module[-4:] for part in linears["blocks.1.projection.qkv.weight"]] == ["to_q", "to_k", "to_v"]
