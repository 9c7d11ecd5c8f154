"""Calibration of a dynamic model, and readers of its output.

``backbones/calibration_effort.py`` has the numbers of samples and timesteps, of which a model's recipe chooses.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dyexport.backbones.base import Preset
from dyexport.backbones.calibration_effort import TRAJECTORY_POINTS
from dyexport.bundle.manifest_file import TOKENS, WIDTHS
from dyexport.bundle.plan import Segment, SegmentPlan
from dyexport.bundle.spec import ModelSpec, Precision, Quantization
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
from dyexport.checkpoints.placement import load_placed
from dyexport.checkpoints.stored_weights import StoredWeights
from dyexport.checkpoints.structure import read_config
from dyexport.errors import BudgetError, DyexportWarning
from dyexport.flops import FlopsModel
from dyexport.models.devices import bf16_products
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline.networks import OwnDense
from dyexport.pipeline.placing import place
from dyexport.pipeline.repair import save_repaired
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.training_cost import trainable
from dyexport.progress import Progress
from dyexport.slicing.merging import merging_reader
from dyexport.slicing.recipes import Read
from dyexport.slicing.slicer import dense_reader, spec_of

METRICS = "metrics.json"


def make_calibrated(
    settings: BuildSettings,
    static: Path,
    dynamic: Path,
    inputs: NoisedInputs,
    phases: Callable[[str], Progress],
    out: Path,
) -> None:
    """Write the bundle's reference: the dynamic model on budget, its tables and its metrics.

    ``phases`` returns where a phase of calibration reports its progress.
    """
    preset = settings.preset
    lora = read_spec(dynamic).td_lora
    plain = lora is not None and lora.experts == 1
    placement, inputs = place(settings, inputs, bf16=settings.calibrates_in_bf16, whole=plain)
    model, _ = load_dynamic(dynamic, **placement)
    if model.budgets:
        assert settings.budget is not None
        model.fix_budget(settings.budget)
    if plain:
        model.merge_lora()
    with bf16_products(model.device, enabled=settings.calibrates_in_bf16):
        missed = _meet_budget(settings, model, inputs, phases)
        metrics = {} if missed is None else {"missed_flops_ratio": missed}
        if settings.repairs:
            metrics["unrepaired_relative_mse"] = _distance(
                settings, model, model.backbone, inputs, phases("comparison before repair")
            )
            save_repaired(settings, model, dynamic, inputs, phases("repair"), out)
            model, _ = load_dynamic(out, **placement)
        else:
            save_dynamic(model, out, preset, backbone=None if plain else dynamic)
        changed = settings.repairs or settings.routers == "trained" or lora is not None
        dense = load_placed(str(static), preset, **placement) if changed else model.backbone
        _measure(settings, model, dense, inputs, phases, out, metrics)


def _measure(
    settings: BuildSettings,
    model: DynamicTransformer,
    dense: nn.Module,
    inputs: NoisedInputs,
    phases: Callable[[str], Progress],
    out: Path,
    metrics: Mapping[str, float],
) -> None:
    """Write the tables and the metrics, next to those given."""
    preset, effort = settings.preset, settings.recipe.calibration
    widths = read_widths(model, preset.timestep_range)
    stats = None
    if model.has_token_routers:
        stats = measure_tokens(
            model,
            inputs,
            tokens=preset.tokens,
            points=effort.tokens,
            repeats=effort.token_draws,
            progress=phases("tokens"),
        )
    (out / WIDTHS).parent.mkdir()
    widths.save(out / WIDTHS)
    if stats is not None:
        stats.save(out / TOKENS)
    points = trajectory_points(preset.timestep_range, TRAJECTORY_POINTS)
    kept = stats.mean_fraction(points) if stats is not None else np.ones((len(points), model.depth))  # (P, L)
    metrics = {
        **metrics,
        "flops_ratio": flops_ratio(widths, kept, points, FlopsModel.of_preset(preset)),
        **trainable(settings),
        "output_relative_mse": _distance(settings, model, dense, inputs, phases("comparison")),
    }
    (out / METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _meet_budget(
    settings: BuildSettings, model: DynamicTransformer, inputs: NoisedInputs, phases: Callable[[str], Progress]
) -> float | None:
    """Bring the model onto the budget, if there is one: shift its routers, or make a table of widths by importance.

    Trained routers that cannot meet the budget give way to a table; the result is then the FLOPs ratio nearest to the
    budget that they reach. Other routers raise ``BudgetError``.
    """
    missed = None
    if settings.budget is None:
        return None
    flops, effort = FlopsModel.of_preset(settings.preset), settings.recipe.calibration
    if settings.routers != "none" and model.table is None:
        try:
            meet_budget(model, inputs, settings.budget, flops, phases("budget"))
            return None
        except BudgetError as error:
            if settings.routers != "trained":
                raise
            warnings.warn(_unused_routers(error), DyexportWarning, stacklevel=1)
            missed = error.nearest
            for router in model.block_routers:
                router.run_all_tokens()
    model.table = choose_widths(
        model,
        inputs,
        settings.budget,
        flops,
        count=effort.importance,
        probes=effort.probes,
        progress=phases("importance"),
    )
    return missed


def _unused_routers(error: BudgetError) -> str:
    """Describe what a build does with trained routers that miss its budget: it meets the budget without them."""
    missed, _, cure = str(error).partition("; ")
    return (
        f"{missed}; widths chosen by importance meet it instead, every token runs, and the trained routers are not "
        f"used; to use them, {cure}"
    )


@torch.no_grad()
def _distance(
    settings: BuildSettings, model: DynamicTransformer, dense: nn.Module, inputs: NoisedInputs, progress: Progress
) -> float:
    """Return the squared distance to the static model's output over its squared norm, over the trajectory."""
    points = trajectory_points(settings.preset.timestep_range, settings.recipe.calibration.compared).tolist()
    distance = norm = torch.zeros((), dtype=torch.float64)
    for chunk in inputs.chunks(points, progress):
        arguments = inputs.over(chunk, device=model.device)
        expected = model.adapter.run(dense, arguments)  # (B, ...)
        distance = distance + (model(arguments).sample - expected).double().square().sum().cpu()
        norm = norm + expected.double().square().sum().cpu()
    return float(distance / norm)


def make_magnitudes(
    settings: BuildSettings, calibrated: Path, inputs: NoisedInputs, progress: Progress, out: Path
) -> None:
    """Write the largest magnitude of each layer's output."""
    placement, inputs = place(settings, inputs)
    model, preset = load_dynamic(calibrated, **placement)
    points = trajectory_points(preset.timestep_range, settings.recipe.calibration.compared)
    magnitudes = measure_magnitudes(model, inputs, points.tolist(), progress)
    out.write_text(json.dumps(magnitudes, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_calibrated(
    directory: Path, preset: Preset, precision: Precision, quantization: Quantization | None
) -> tuple[ModelSpec, WidthTable, TokenStats | None]:
    """Read the specification, widths and token statistics of a calibrated model, without its weights."""
    stored = read_spec(directory)
    config = read_config(directory, preset)
    spec = spec_of(preset, config, stored.td_lora, precision, quantization, stored.token_router)
    stats = TokenStats.load(directory / TOKENS) if (directory / TOKENS).is_file() else None
    return spec, WidthTable.load(directory / WIDTHS), stats


def read_metrics(path: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def merge_lora(
    settings: BuildSettings, directory: Path, segments: tuple[Segment, ...], inputs: NoisedInputs
) -> tuple[tuple[Segment, ...], tuple[float, ...]]:
    """Merge the TD-LoRA of segments where that costs little; return the segments, and the cost in each."""
    assert settings.merge_tolerance is not None
    placement, inputs = place(settings, inputs)
    return merge_segments(load_dynamic(directory, **placement)[0], inputs, segments, settings.merge_tolerance)


def calibrated_reader(directory: Path, spec: ModelSpec) -> Read:
    """Return a lazy reader of backbone, routers and TD-LoRA by the names that slices use."""
    read = dense_reader(dynamic_weights(directory), spec)
    return read if spec.td_lora is None else merging_reader(load_dynamic(directory, stream=True)[0], read)


def static_weights(own: OwnDense, static: Path, calibrated: Path) -> Mapping[str, Tensor]:
    """Return the weights that only the dense network has, with their units in the order of its other weights."""
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
    progress: Progress,
    out: Path,
) -> None:
    """Write the ranges of what quantized linear layers read, and what quantization costs."""
    placement, inputs = place(settings, inputs)
    model, preset = load_dynamic(calibrated, **placement)
    dense = load_placed(str(static), preset, **placement) if settings.baseline else None
    ranges = measure_network_ranges(model, dense, settings.recipe.calibration.ranges, plan, tables, inputs, progress)
    out.write_text(ranges.model_dump_json(indent=1) + "\n", encoding="utf-8")
