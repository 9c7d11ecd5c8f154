"""Ranges of what a bundle's quantized linear layers read, network by network, and the error that quantization makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from dyexport.backbones.base import Inputs
from dyexport.bundle.manifest import DENSE, Frozen, ModelSpec, SegmentPlan, segment_name
from dyexport.bundle.reader import RANGES, Bundle
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.calibration.effort import effort_for
from dyexport.calibration.ranges import fake_quantized, measure_ranges, quantization_error
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.checkpoints.static import load_static
from dyexport.checkpoints.streaming import must_stream
from dyexport.errors import BundleError
from dyexport.models.dynamic import DynamicOutput, DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline.networks import Network, architecture_of
from dyexport.pipeline.settings import BuildSettings
from dyexport.slicing.quantizing import LinearInput, linear_inputs
from dyexport.slicing.slicer import slice_segment

Tables = tuple[ModelSpec, WidthTable, TokenStats | None]
LinearInputs = Mapping[str, tuple[LinearInput, ...]]
"""What each slim weight is multiplied with."""


class Ranges(Frozen):
    """The largest magnitude of what each slim weight is multiplied with, by network; ``errors`` are by segment."""

    networks: dict[str, dict[str, float]]
    errors: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Ranges:
        """Raises ``BundleError`` for a file that holds none."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise BundleError(f"cannot read {path}: {error}; build the bundle again") from error

    def attach(self, network: Network) -> Network:
        """The network with its ranges; conditioning, which is not quantized, has none."""
        return replace(network, slice=replace(network.slice, ranges=self.networks.get(network.name, {})))


class QuantizedModel:
    """The masked model, fake-quantized with the ranges of a bundle: what its engines compute."""

    def __init__(self, model: DynamicTransformer, bundle: Bundle) -> None:
        spec, plan = bundle.manifest.model, bundle.manifest.plan
        assert spec.quantization is not None
        self.model, self.quantization = model, spec.quantization
        linears = _linear_inputs(plan, (spec, bundle.widths, bundle.token_stats))
        networks = Ranges.read(bundle.root / RANGES).networks
        self.ranges = [_by_input(linears, networks[segment_name(index)]) for index in range(len(plan.segments))]

    def run(self, segment: int, inputs: Inputs) -> DynamicOutput:
        with fake_quantized(self.model.backbone, self.ranges[segment], self.quantization):
            output: DynamicOutput = self.model(inputs)
        return output


def make_ranges(
    settings: BuildSettings,
    static: Path,
    calibrated: Path,
    plan: SegmentPlan,
    tables: Tables,
    inputs: NoisedInputs,
    out: Path,
) -> None:
    """Every segment over its own t, and the static model over all; errors against the masked model as it is."""
    assert settings.quantize is not None
    stream = must_stream(settings.preset.parameters, settings.memory)
    model, preset = load_dynamic(calibrated, stream=stream)
    linears, count = _linear_inputs(plan, tables), effort_for(settings.preset).ranges
    every = [part for parts in linears.values() for part in parts]
    networks, errors = {}, []
    for index, segment in enumerate(plan.segments):
        points = _points(segment.start, segment.end, count)
        found = measure_ranges(model.backbone, model, inputs, points, every)
        errors.append(quantization_error(model, inputs, segment, found, settings.quantize))
        networks[segment_name(index)] = _by_weight(linears, found)
    if settings.baseline:
        dense, points = load_static(str(static), preset, stream=stream), _points(*preset.timestep_range, count)
        found = measure_ranges(dense, partial(model.adapter.run, dense), inputs, points, every)
        networks[DENSE] = _by_weight(linears, found)
    out.write_text(Ranges(networks=networks, errors=tuple(errors)).model_dump_json(indent=1) + "\n", encoding="utf-8")


def _points(start: float, end: float, count: int) -> list[float]:
    """Evenly spaced from ``start`` to just before ``end``, which is the next segment's; values are largest there."""
    return np.linspace(start, np.nextafter(np.float32(end), np.float32(start)), count).tolist()


def _linear_inputs(plan: SegmentPlan, tables: Tables) -> LinearInputs:
    """The same in every network."""
    return linear_inputs(slice_segment(architecture_of(*tables), plan.segments[0]))


def _by_input(linears: LinearInputs, ranges: Mapping[str, float]) -> dict[LinearInput, float]:
    return {part: ranges[weight] for weight, parts in linears.items() for part in parts}


def _by_weight(linears: LinearInputs, found: Mapping[LinearInput, float]) -> dict[str, float]:
    return {weight: max(found[part] for part in parts) for weight, parts in linears.items()}
