"""What is timed: a bundle and the dense networks it is compared with, each as a function of no arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dyexport.bundle import Bundle, ModelSpec
from dyexport.errors import UsageError
from dyexport.runtime.pipeline import BundleTransformer

Variant = Callable[[], object]


def example_inputs(spec: ModelSpec, batch: int, t: float, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Noise with labels, all at one t; the same tensors for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(batch, *spec.latent_shape, generator=generator),  # (B, C, H, W)
        "timestep": torch.full((batch,), t),  # (B,)
        "class_labels": torch.arange(batch) % spec.classes,  # (B,)
    }
    return {name: value.to(device) for name, value in inputs.items()}


def segment_variants(transformer: BundleTransformer, bundle: Bundle, batch: int) -> list[Variant]:
    """The loaded bundle called at the middle of each segment: routing, gates and slots are part of the call."""
    spec, device = bundle.manifest.model, str(transformer.device)
    middles = [(segment.start + segment.end) / 2 for segment in bundle.manifest.plan.segments]
    return [module_variant(transformer, example_inputs(spec, batch, t, device), device) for t in middles]


def conditioning_variant(transformer: BundleTransformer, batch: int, steps: int) -> Variant:
    """The conditioning network for all steps of a trajectory at once, as a bundle runs it."""
    spec, device = transformer.spec, str(transformer.device)
    inputs = {
        "timestep": torch.linspace(*spec.timestep_range, steps).repeat_interleave(batch).to(device),  # (S * B,)
        "class_labels": (torch.arange(batch) % spec.classes).repeat(steps).to(device),  # (S * B,)
    }
    return lambda: transformer.conditioner.engine.run(inputs)


def stock_transformer(spec: ModelSpec, device: str = "cpu") -> torch.nn.Module:
    """diffusers' own module at the bundle's size; its weights are random, which no time depends on."""
    from diffusers import DiTTransformer2DModel

    if spec.backbone not in ("dit", "sit"):
        raise UsageError(f"{spec.name} has backbone {spec.backbone!r}; its dense module is known for dit and sit only")
    module: torch.nn.Module = DiTTransformer2DModel(**spec.config).eval().to(device)
    return module


def module_variant(module: Callable[..., object], inputs: dict[str, Any], device: str) -> Variant:
    @torch.inference_mode()
    def run() -> None:
        module(**inputs)
        if device != "cpu":
            torch.cuda.synchronize(device)  # a GPU returns before it is done

    return run


def compiled_variant(module: torch.nn.Module, inputs: dict[str, Any], device: str) -> Variant | None:
    """The module under ``torch.compile``, already compiled; None where this machine has no compiler for it."""
    from torch._inductor.exc import InductorError

    run = module_variant(torch.compile(module, dynamic=False), inputs, device)
    try:
        run()
    except InductorError:
        return None
    return run
