"""Ranges of the inputs of a bundle's quantized linear layers by network, and the quantization error."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from torch import Tensor, nn

from dyexport.backbones.base import Inputs
from dyexport.bundle.manifest import DENSE
from dyexport.bundle.plan import SegmentPlan, segment_name
from dyexport.bundle.records import REPLACE, Frozen
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.calibration.ranges import fake_quantized, measure_ranges, quantization_error
from dyexport.errors import BundleError
from dyexport.models.dynamic import DynamicOutput, DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.progress import Progress, no_progress
from dyexport.slicing.quantizing import LinearInput, linear_inputs
from dyexport.slicing.slicer import Slice, SliceContext, slice_segment

Tables = tuple[ModelSpec, WidthTable, TokenStats | None]
LinearInputs = Mapping[str, tuple[LinearInput, ...]]
"""Inputs of each slim weight, by the name of the weight."""


class Ranges(Frozen):
    """Largest input magnitude of each quantized slim weight by network, and quantization errors by segment."""

    networks: dict[str, dict[str, float]]
    errors: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Ranges:
        """Read ranges; raises ``BundleError`` for an invalid file."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise BundleError(f"cannot read {path}: {error}; {REPLACE}") from error

    def attach(self, network: str, piece: Slice) -> Slice:
        """Return the network's slice with its ranges; conditioning, which is not quantized, has none."""
        return replace(piece, ranges=self.networks.get(network, {}))


class QuantizedModel:
    """The masked model, fake-quantized with the ranges of a bundle as its engines are."""

    def __init__(self, model: DynamicTransformer, plan: SegmentPlan, tables: Tables, ranges: Ranges) -> None:
        quantization = tables[0].quantization
        assert quantization is not None
        self.model, self.quantization = model, quantization
        self._linears, self._networks = _linear_inputs(plan, tables), ranges.networks

    def run(self, segment: int, inputs: Inputs) -> DynamicOutput:
        """Run the masked model as the engine of a segment does."""
        with self._quantized(self.model.backbone, segment_name(segment)):
            output: DynamicOutput = self.model(inputs)
        return output

    def run_dense(self, dense: nn.Module, inputs: Inputs) -> Tensor:
        """Run the static model as the dense engine does: (B, ...)."""
        with self._quantized(dense, DENSE):
            return self.model.adapter.run(dense, inputs)

    def _quantized(self, backbone: nn.Module, network: str) -> AbstractContextManager[None]:
        return fake_quantized(backbone, _by_input(self._linears, self._networks[network]), self.quantization)


def measure_network_ranges(
    model: DynamicTransformer,
    dense: nn.Module | None,
    points_per_segment: int,
    plan: SegmentPlan,
    tables: Tables,
    inputs: NoisedInputs,
    progress: Progress = no_progress,
) -> Ranges:
    """Measure every segment over its own timesteps, and with ``dense`` the static model over all of them.

    Errors are those of the fake-quantized masked model against the masked model.
    """
    quantization = tables[0].quantization
    assert quantization is not None
    linears = _linear_inputs(plan, tables)
    every = [part for parts in linears.values() for part in parts]
    networks, errors = {}, []
    for index, segment in enumerate(plan.segments):
        points = _points(segment.start, segment.end, points_per_segment)
        magnitudes = measure_ranges(model.backbone, model, inputs, points, every, progress, model.device)
        errors.append(quantization_error(model, inputs, segment, magnitudes, quantization))
        networks[segment_name(index)] = _by_weight(linears, magnitudes)
    if dense is not None:
        points = _points(*tables[0].timestep_range, points_per_segment)
        magnitudes = measure_ranges(
            dense, partial(model.adapter.run, dense), inputs, points, every, progress, model.device
        )
        networks[DENSE] = _by_weight(linears, magnitudes)
    return Ranges(networks=networks, errors=tuple(errors))


def _points(start: float, end: float, count: int) -> list[float]:
    """Return evenly spaced timesteps from ``start`` to just below ``end``, where values are largest."""
    return np.linspace(start, np.nextafter(np.float32(end), np.float32(start)), count).tolist()


def _linear_inputs(plan: SegmentPlan, tables: Tables) -> LinearInputs:
    """Return the inputs of the quantized linear layers, which are the same in every network."""
    return linear_inputs(slice_segment(SliceContext.of(*tables), plan.segments[0]))


def _by_input(linears: LinearInputs, ranges: Mapping[str, float]) -> dict[LinearInput, float]:
    return {part: ranges[weight] for weight, parts in linears.items() for part in parts}


def _by_weight(linears: LinearInputs, magnitudes: Mapping[LinearInput, float]) -> dict[str, float]:
    return {weight: max(magnitudes[part] for part in parts) for weight, parts in linears.items()}
