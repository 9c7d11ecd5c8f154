"""Variants to time, as functions without arguments: a bundle, and the dense networks it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dyexport.bundle.reader import Bundle
from dyexport.runtime.stock import example_inputs
from dyexport.runtime.transformer import BundleTransformer

Variant = Callable[[], object]


def segment_variants(transformer: BundleTransformer, bundle: Bundle, batch: int) -> list[Variant]:
    """Return calls of the loaded bundle at the middle of each segment, including routing, gates and slots."""
    spec, device = bundle.manifest.model, str(transformer.device)
    middles = [(segment.start + segment.end) / 2 for segment in bundle.manifest.plan.segments]
    return [module_variant(transformer, _on(device, example_inputs(spec, batch, t)), device) for t in middles]


def _on(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def conditioning_variant(transformer: BundleTransformer, batch: int, steps: int) -> Variant:
    """Return a call of the conditioning network for all steps of a trajectory at once, as a bundle runs it."""
    spec, engine = transformer.spec, transformer.conditioner.engine
    example = example_inputs(spec, batch, spec.timestep_range[0])
    names = {binding.name for binding in engine.io.inputs} - {"timestep"}
    rows = {name: example[name].repeat(steps, *[1] * (example[name].ndim - 1)) for name in names}  # (S * B, ...)
    samples = batch if names else 1  # samples share rows if t is the only input
    rows["timestep"] = torch.linspace(*spec.timestep_range, steps).repeat_interleave(samples)  # (S * B,)
    moved = {name: value.to(transformer.device) for name, value in rows.items()}
    return lambda: engine.run(moved)


def module_variant(module: Callable[..., object], inputs: dict[str, Any], device: str) -> Variant:
    @torch.inference_mode()
    def run() -> None:
        module(**inputs)
        if device != "cpu":
            torch.cuda.synchronize(device)  # kernels run asynchronously

    return run


def compiled_variant(module: torch.nn.Module, inputs: dict[str, Any], device: str) -> Variant | None:
    """Return a call of the module under ``torch.compile``, already compiled; None if this machine cannot compile it."""
    from torch._inductor.exc import InductorError

    run = module_variant(torch.compile(module, dynamic=False), inputs, device)
    try:
        run()
    except InductorError:
        return None
    return run
