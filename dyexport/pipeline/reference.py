"""Stages after training: the reference of a bundle, what it costs in fidelity, and how export reads it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dyexport.backbones.base import Preset
from dyexport.bundle.manifest import ModelSpec, Precision, Quantization, Segment, SegmentPlan
from dyexport.bundle.reader import TOKENS, WIDTHS
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.calibration.merging import merge_segments
from dyexport.calibration.precision import measure_magnitudes
from dyexport.calibration.quantization import Tables, measure_network_ranges
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import (
    choose_widths,
    flops_ratio,
    meet_budget,
    read_widths,
    trajectory_points,
)
from dyexport.checkpoints.dynamic import dynamic_weights, load_dynamic, ranked_biases, read_spec, save_dynamic
from dyexport.checkpoints.static import load_static
from dyexport.checkpoints.stored_weights import StoredWeights
from dyexport.checkpoints.streaming import must_stream
from dyexport.checkpoints.structure import read_config
from dyexport.errors import BudgetError
from dyexport.flops import FlopsModel
from dyexport.models.devices import bf16_products
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline.networks import OwnDense
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.stages import trainable
from dyexport.slicing.merging import merging_reader
from dyexport.slicing.recipes import Read
from dyexport.slicing.slicer import dense_reader, spec_of

METRICS = "metrics.json"
TRAJECTORY_POINTS = 512  # more than a table has rows


def make_calibrated(settings: BuildSettings, static: Path, dynamic: Path, inputs: NoisedInputs, out: Path) -> None:
    """The reference of the bundle: the dynamic model on budget, its tables, and what the budget costs in fidelity."""
    preset = settings.preset
    lora = read_spec(dynamic).td_lora
    plain = lora is not None and lora.experts == 1
    stream = must_stream(preset.parameters, settings.memory) and not plain
    model, _ = load_dynamic(dynamic, stream=stream)
    if plain:
        model.merge_lora()
    with bf16_products(model.device, enabled=settings.calibrates_in_bf16):
        _meet(settings, model, inputs)
        save_dynamic(model, out, preset, backbone=None if plain else dynamic)
        tuned = settings.routers == "trained" or lora is not None
        dense = load_static(str(static), preset, stream=stream) if tuned else model.backbone
        _measure(settings, model, dense, inputs, out)


def _measure(
    settings: BuildSettings, model: DynamicTransformer, dense: nn.Module, inputs: NoisedInputs, out: Path
) -> None:
    """Write the tables, and the metrics."""
    preset, passes = settings.preset, settings.recipe.calibration
    widths = read_widths(model, preset.timestep_range)
    stats = None
    if model.has_token_routers:
        drawn = inputs.during("tokens")
        stats = measure_tokens(model, drawn, tokens=preset.tokens, points=passes.tokens, draws=passes.token_draws)
    (out / WIDTHS).parent.mkdir()
    widths.save(out / WIDTHS)
    if stats is not None:
        stats.save(out / TOKENS)
    points, compared = (trajectory_points(preset.timestep_range, n) for n in (TRAJECTORY_POINTS, passes.compared))
    kept = stats.mean_fraction(points) if stats is not None else np.ones((len(points), model.depth))  # (P, L)
    metrics = {
        "flops_ratio": flops_ratio(widths, kept, points, FlopsModel.of_preset(preset)),
        **trainable(settings),
        "output_relative_mse": _relative_mse(model, dense, inputs.during("comparison"), compared.tolist()),
    }
    (out / METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _meet(settings: BuildSettings, model: DynamicTransformer, inputs: NoisedInputs) -> None:
    """Bring the model onto the budget, if there is one: by its routers, or where they are not trained by a table."""
    if settings.budget is None:
        return
    if settings.routers == "none" or model.table is not None:
        _choose(settings, settings.budget, model, inputs)
        return
    try:
        meet_budget(model, inputs.during("budget"), settings.budget, FlopsModel.of_preset(settings.preset))
    except BudgetError as error:
        if settings.routers != "trained":
            raise
        warnings.warn(f"{error}; until then widths are chosen by importance and all tokens run", stacklevel=1)
        for router in model.block_routers:
            router.run_all_tokens()
        _choose(settings, settings.budget, model, inputs)


def _choose(settings: BuildSettings, budget: float, model: DynamicTransformer, inputs: NoisedInputs) -> None:
    flops, passes = FlopsModel.of_preset(settings.preset), settings.recipe.calibration
    drawn = inputs.during("importance")
    model.table = choose_widths(model, drawn, budget, flops, count=passes.importance, probes=passes.probes)


@torch.no_grad()
def _relative_mse(model: DynamicTransformer, dense: nn.Module, inputs: NoisedInputs, points: list[float]) -> float:
    """Squared distance to the static model's output over its squared norm, over the trajectory."""
    apart = norm = torch.zeros((), dtype=torch.float64)
    for chunk in inputs.chunks(points):
        arguments = inputs.over(chunk)
        truth = model.adapter.run(dense, arguments)  # (B, ...)
        apart = apart + (model(arguments).sample - truth).double().square().sum()
        norm = norm + truth.double().square().sum()
    return float(apart / norm)


def make_magnitudes(settings: BuildSettings, calibrated: Path, inputs: NoisedInputs, out: Path) -> None:
    """The largest magnitude of each layer's output."""
    model, preset = load_dynamic(calibrated, stream=must_stream(settings.preset.parameters, settings.memory))
    points = trajectory_points(preset.timestep_range, settings.recipe.calibration.compared)
    found = measure_magnitudes(model, inputs, points.tolist())
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_calibrated(
    directory: Path, preset: Preset, precision: Precision, quantization: Quantization | None
) -> tuple[ModelSpec, WidthTable, TokenStats | None]:
    """What planning needs to know of a calibrated model; reads no weights."""
    spec = spec_of(preset, read_config(directory, preset), read_spec(directory).td_lora, precision, quantization)
    stats = TokenStats.load(directory / TOKENS) if (directory / TOKENS).is_file() else None
    return spec, WidthTable.load(directory / WIDTHS), stats


def read_metrics(path: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def merge_lora(
    settings: BuildSettings, directory: Path, segments: tuple[Segment, ...], inputs: NoisedInputs
) -> tuple[tuple[Segment, ...], tuple[float, ...]]:
    """Segments of a calibrated model, its TD-LoRA merged where that costs little; what it costs in each."""
    assert settings.merge_tolerance is not None
    stream = must_stream(settings.preset.parameters, settings.memory)
    return merge_segments(load_dynamic(directory, stream=stream)[0], inputs, segments, settings.merge_tolerance)


def calibrated_reader(directory: Path, spec: ModelSpec) -> Read:
    """Backbone, routers and TD-LoRA by the names that slices read, from disk when they are asked for."""
    read = dense_reader(dynamic_weights(directory), spec)
    return read if spec.td_lora is None else merging_reader(load_dynamic(directory, stream=True)[0], read)


def static_weights(own: OwnDense, static: Path, calibrated: Path) -> Mapping[str, Tensor]:
    """What the dense network has of its own, in the order of units that goes with the rest of its weights."""
    if own == "nothing":
        return {}
    return ranked_biases(static, calibrated) if own == "biases" else StoredWeights(static)


def make_ranges(
    settings: BuildSettings,
    static: Path,
    calibrated: Path,
    plan: SegmentPlan,
    tables: Tables,
    inputs: NoisedInputs,
    out: Path,
) -> None:
    """Measure the ranges of what quantized linear layers read, and what quantization costs."""
    stream = must_stream(settings.preset.parameters, settings.memory)
    model, preset = load_dynamic(calibrated, stream=stream)
    dense = load_static(str(static), preset, stream=stream) if settings.baseline else None
    ranges = measure_network_ranges(model, dense, settings.recipe.calibration.ranges, plan, tables, inputs)
    out.write_text(ranges.model_dump_json(indent=1) + "\n", encoding="utf-8")
