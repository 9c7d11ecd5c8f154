"""Comparison of every layer of a bundle's networks with torch, to find the first one that differs.

Both sides run the same slim network on the same inputs: ONNX Runtime the graph and weights of the bundle, torch the
module that a build exports, its weights read from the reference. A wrong weight or node shows where it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyexport.bundle.manifest import CONDITIONING
from dyexport.bundle.reader import Bundle
from dyexport.pipeline.calibrate import calibrated_reader
from dyexport.pipeline.networks import cut_networks
from dyexport.pipeline.reference_model import ReferenceModel
from dyexport.runtime.routing import Route, route
from dyexport.slicing.slicer import Slice, SliceContext
from dyexport.verification.activations import ActivationPair, match_activations
from dyexport.verification.report import LayerErrors, LayerReport


def compare_layers(bundle: Bundle, directory: Path, reference: ReferenceModel, tolerance: float) -> LayerReport:
    """Compare every network of a bundle, in the middle of its interval of t; ``directory`` holds the reference."""
    manifest, widths, stats = bundle.manifest, bundle.widths, bundle.token_stats
    context = SliceContext.of(manifest.model, widths, stats)
    cut = cut_networks(context, widths, manifest.plan.segments, baseline=False, own_dense="nothing")
    slices = {network.name: network.slice for network in cut}
    segments = {network.name: network.segment for network in cut}
    read, paths = calibrated_reader(directory, manifest.model), bundle.engine_paths("onnx")
    conditioner = slices[CONDITIONING].load(read)
    layers: list[LayerErrors] = []
    first_drift: LayerErrors | None = None
    unmatched = 0
    for name in (CONDITIONING, *(name for name in slices if name != CONDITIONING)):
        segment = segments[name]
        interval = segment or manifest.plan.segments[0]
        t = float(np.float32((interval.start + interval.end) / 2))
        inputs, _ = reference.at(t)
        if segment is not None:
            with torch.no_grad():
                modulation = conditioner(**_select(slices[CONDITIONING], inputs))
            inputs = {**inputs, "modulation": modulation, **_routed(route(manifest.plan, widths, stats, t))}
        activations = match_activations(paths[name], slices[name].load(read), _select(slices[name], inputs))
        layers += _by_module(name, activations.pairs)
        first_drift = first_drift or _first_drift(name, activations.pairs, tolerance)
        unmatched += activations.unmatched
    return LayerReport(tolerance=tolerance, layers=tuple(layers), first_drift=first_drift, unmatched=unmatched)


def _select(piece: Slice, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of one network; the first sample's if samples share an input."""
    return {spec.name: inputs[spec.name][:1] if spec.shape[0] == 1 else inputs[spec.name] for spec in piece.inputs}


def _routed(chosen: Route) -> dict[str, Tensor]:
    routed = {} if chosen.gate is None else {"width_gate": torch.from_numpy(chosen.gate)}
    return routed if chosen.slots is None else {**routed, "slots": torch.zeros(chosen.slots)}


def _by_module(network: str, pairs: Sequence[ActivationPair]) -> list[LayerErrors]:
    modules: dict[str, list[ActivationPair]] = {}
    for pair in pairs:
        modules.setdefault(pair.module, []).append(pair)
    return [_errors(network, of_module) for of_module in modules.values()]


def _first_drift(network: str, pairs: Sequence[ActivationPair], tolerance: float) -> LayerErrors | None:
    for pair in pairs:
        errors = _errors(network, [pair])
        if errors.relative_error is None or errors.relative_error > tolerance:
            return errors
    return None


def _errors(network: str, pairs: Sequence[ActivationPair]) -> LayerErrors:
    """Return the largest errors of one module's tensors."""
    distances = [_distance(pair) for pair in pairs]
    absolute, relative = (max(side) if all(map(math.isfinite, side)) else None for side in zip(*distances, strict=True))
    module = pairs[0].module or network
    return LayerErrors(
        network=network, module=module, values=len(pairs), max_abs_error=absolute, relative_error=relative
    )


def _distance(pair: ActivationPair) -> tuple[float, float]:
    """Return the largest absolute difference, and the norm of the difference over torch's.

    Elementwise ratios mean nothing near 0.
    """
    if pair.onnx.shape != pair.torch.shape:
        return math.inf, math.inf
    expected = pair.torch.astype(np.float64)
    difference, norm = pair.onnx - expected, float(np.linalg.norm(expected))
    relative = float(np.linalg.norm(difference)) / norm if norm else math.inf if difference.any() else 0.0
    return float(np.abs(difference).max(initial=0.0)), relative
