"""Variants to time, as functions without arguments: a bundle, and the dense networks it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.runtime.stock import example_inputs
from dyexport.runtime.transformer import BundleTransformer

Variant = Callable[[], object]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def segment_variants(
    transformer: BundleTransformer, bundle: Bundle, batch: int, spec: ModelSpec | None = None
) -> list[Variant]:
    """Return calls of the loaded bundle at the middle of each segment, including routing, gates and slots.

    ``spec`` is that of another size than the bundle's.
    """
    spec, device = spec or bundle.manifest.model, str(transformer.device)
    middles = [(segment.start + segment.end) / 2 for segment in bundle.manifest.plan.segments]
    return [module_variant(transformer, on_device(device, example_inputs(spec, batch, t))) for t in middles]


def dense_variant(transformer: BundleTransformer, spec: ModelSpec, batch: int) -> Variant:
    """Return a call of a bundle's dense network."""
    inputs = example_inputs(spec, batch, sum(spec.timestep_range) / 2)
    return module_variant(transformer, on_device(str(transformer.device), inputs))


def on_device(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def conditioning_variant(transformer: BundleTransformer, batch: int, steps: int) -> Variant:
    """Return a call of the conditioning network for all steps of a trajectory at once, as a bundle runs it."""
    spec, engine = transformer.spec, transformer.conditioner.engine
    example = example_inputs(spec, batch, spec.timestep_range[0])
    names = {binding.name for binding in engine.io.inputs} - {"timestep"}
    rows = {name: example[name].repeat(steps, *[1] * (example[name].ndim - 1)) for name in names}  # (S * B, ...)
    samples = batch if names else 1  # samples share rows if t is the only input
    rows["timestep"] = torch.linspace(*spec.timestep_range, steps).repeat_interleave(samples)  # (S * B,)
    moved = on_device(str(transformer.device), rows)
    return lambda: engine.run(moved)


def stock_variant(module: Callable[..., object], spec: ModelSpec, batch: int, device: str) -> Variant:
    """Return a call of diffusers' module, which is in the bundle's precision, at the middle of the trajectory."""
    dtype = DTYPES[spec.precision]
    inputs = on_device(device, example_inputs(spec, batch, sum(spec.timestep_range) / 2))
    cast = {
        name: value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
        for name, value in inputs.items()
    }
    return module_variant(module, cast)


def module_variant(module: Callable[..., object], inputs: dict[str, Any]) -> Variant:
    @torch.inference_mode()
    def run() -> None:
        module(**inputs)

    return run
