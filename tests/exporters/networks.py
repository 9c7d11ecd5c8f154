"""Networks of presets in small, their graphs over a store of noise, and the plans that they ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dyexport.backbones.base import Preset
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.bundle.plan import Segment, TokenPath
from dyexport.bundle.plan_info import PlanInfo
from dyexport.bundle.spec import Precision
from dyexport.bundle.tables import UnitOrder
from dyexport.exporters.onnx_graph import STORE, export_onnx
from dyexport.exporters.tensorrt_plan import PlanRequest, build_plan
from dyexport.exporters.tensorrt_profiles import largest_topk, profiles_for
from dyexport.slicing.slicer import Slice, SliceContext, dense_segment, slice_segment, spec_of
from dyexport.slicing.store_layout import lay_out

ONE_BLOCK_EACH = FluxPreset(name="flux-1-1", double_blocks=1, single_blocks=1)  # FLUX.1-dev at full width


def half_width(preset: Preset, path: TokenPath) -> Segment:
    """Every second unit, the others gone; room for three quarters of the tokens."""
    depth, half = preset.depth, tuple(range(0, preset.heads, 2))
    room = preset.tokens // 2 if path == "dynamic" else 3 * preset.tokens // 4
    return Segment(
        start=preset.timestep_range[0],
        end=preset.timestep_range[1],
        heads=(half,) * depth,
        groups=(half,) * depth,
        gated_heads=(True,) * depth,
        gated_groups=(False,) * depth,
        token_paths=(path,) * depth,
        capacities=(room,) * depth,
        slot_buckets=tuple(sorted({4, preset.tokens // 4})) if path == "dynamic" else (),
    )


def slice_context(preset: Preset, precision: Precision = "fp32", *, token_routers: bool = True) -> SliceContext:
    kind = preset.recorded(preset.token_routers[-1])
    spec = spec_of(preset, preset.transformer_config(), precision=precision, token_router=kind)
    return SliceContext(spec=spec, groups=preset.heads, token_routers=token_routers)


def dense_network(preset: Preset, precision: Precision = "fp32") -> Slice:
    """Every unit and every token."""
    context = slice_context(preset, precision, token_routers=False)
    every = (tuple(range(preset.heads)),) * preset.depth
    return slice_segment(context, dense_segment(context.spec, UnitOrder(heads=every, groups=every)))


def write_graph(slice_: Slice, directory: Path) -> Path:
    """The graph of a slice over a store of noise."""
    layout = lay_out(slice_.recipes.values())
    half = np.random.default_rng(0).integers(0x2C00, 0x3800, layout.nbytes // 2, dtype=np.uint16)  # small in any float
    half.tofile(directory / STORE)
    export_onnx(slice_, layout, directory / "network.onnx")
    return directory / "network.onnx"


def request_for(context: SliceContext, slice_: Slice, segment: Segment | None, **values: object) -> PlanRequest:
    given = {
        "flavour": "tensorrt-rtx",
        "compute_capabilities": ("8.9",),
        "precision": context.spec.precision,
        "inputs": slice_.inputs,
        "profiles": profiles_for(context.spec, segment, ()),
        "largest_topk": largest_topk(context.spec, segment, profiles_for(context.spec, segment, ())),
    }
    return PlanRequest(**{**given, **values})  # type: ignore[arg-type]


def build_segment(preset: Preset, directory: Path, *, path: TokenPath, precision: Precision = "fp32") -> PlanInfo:
    context, segment = slice_context(preset, precision), half_width(preset, path)
    slice_ = slice_segment(context, segment)
    graph = write_graph(slice_, directory)
    return build_plan(graph, request_for(context, slice_, segment), directory / "plan")
