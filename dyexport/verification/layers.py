"""Which layer of an engine is the first to differ from torch: every network of a bundle, module by module.

Both sides run the same slim network on the same inputs: ONNX Runtime the graph and weights of the bundle, torch the
module that a build exports, its weights read from the reference. A wrong weight or node then shows where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.bundle.reader import Bundle
from dyexport.pipeline import calibrate
from dyexport.pipeline.networks import cut_networks
from dyexport.runtime.routing import Route, route
from dyexport.slicing.slicer import Slice, SliceContext
from dyexport.verification.activations import Pair, pair_up
from dyexport.verification.reference_model import ReferenceModel


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """How far a module's tensors are from torch's: largest difference, and root mean square over root mean square.

    Both are None where shapes differ or a value is not finite. ``values`` is how many tensors were compared.
    """

    network: str
    module: str
    values: int
    max_abs_error: float | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Every module of every network in the order of the graphs; ``tolerance`` is of ``relative_error``.

    ``first_drift`` is where the first tensor beyond it is made, which what follows only passes on.
    """

    tolerance: float
    layers: tuple[LayerErrors, ...]
    first_drift: LayerErrors | None


def compare_layers(bundle: Bundle, directory: Path, truth: ReferenceModel, tolerance: float) -> LayerReport:
    """Each segment in the middle of its interval; ``directory`` is the reference."""
    manifest, widths, stats = bundle.manifest, bundle.widths, bundle.token_stats
    context = SliceContext.of(manifest.model, widths, stats)
    networks = cut_networks(context, widths, manifest.plan.segments, baseline=False, own_dense="nothing")
    read, paths = calibrate.calibrated_reader(directory, manifest.model), bundle.engine_paths("onnx")
    conditioning, segments = networks[-1], networks[:-1]
    condition = conditioning.slice.load(read)
    layers: list[LayerErrors] = []
    first: LayerErrors | None = None
    for network in (conditioning, *segments):
        segment = network.segment or manifest.plan.segments[0]
        t = float(np.float32((segment.start + segment.end) / 2))
        given, _ = truth.at(t)
        feed = _inputs(conditioning.slice, given)
        if network.segment is not None:
            with torch.no_grad():
                feed = {**given, "modulation": condition(**feed), **_routed(route(manifest.plan, widths, stats, t))}
            feed = _inputs(network.slice, feed)
        pairs = pair_up(paths[network.name], network.slice.load(read), feed)
        layers += _by_module(network.name, pairs)
        first = first or _first_drift(network.name, pairs, tolerance)
    return LayerReport(tolerance=tolerance, layers=tuple(layers), first_drift=first)


def _inputs(slice_: Slice, given: Inputs) -> dict[str, Tensor]:
    """What one network takes; where samples share their modulation, the first sample's."""
    return {spec.name: given[spec.name][:1] if spec.shape[0] == 1 else given[spec.name] for spec in slice_.inputs}


def _routed(found: Route) -> dict[str, Tensor]:
    routed = {} if found.gate is None else {"width_gate": torch.from_numpy(found.gate)}
    return routed if found.slots is None else {**routed, "slots": torch.zeros(found.slots)}


def _by_module(network: str, pairs: Sequence[Pair]) -> list[LayerErrors]:
    modules: dict[str, list[Pair]] = {}
    for pair in pairs:
        modules.setdefault(pair.module, []).append(pair)
    return [_errors(network, found) for found in modules.values()]


def _first_drift(network: str, pairs: Sequence[Pair], tolerance: float) -> LayerErrors | None:
    for pair in pairs:
        errors = _errors(network, [pair])
        if errors.relative_error is None or errors.relative_error > tolerance:
            return errors
    return None


def _errors(network: str, pairs: Sequence[Pair]) -> LayerErrors:
    """Of one module's tensors, the worst."""
    found = [_distance(pair) for pair in pairs]
    absolute, relative = (max(side) if all(map(math.isfinite, side)) else None for side in zip(*found, strict=True))
    module = pairs[0].module or network
    return LayerErrors(
        network=network, module=module, values=len(pairs), max_abs_error=absolute, relative_error=relative
    )


def _distance(pair: Pair) -> tuple[float, float]:
    """Largest absolute difference, and the difference's size over torch's. Elementwise ratios mean nothing near 0."""
    if pair.onnx.shape != pair.torch.shape:
        return math.inf, math.inf
    truth = pair.torch.astype(np.float64)
    apart, size = pair.onnx - truth, float(np.linalg.norm(truth))
    relative = float(np.linalg.norm(apart)) / size if size else math.inf if apart.any() else 0.0
    return float(np.abs(apart).max(initial=0.0)), relative
