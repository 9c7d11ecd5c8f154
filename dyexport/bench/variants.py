"""What is timed: a bundle and the dense networks it is compared with, each as a function of no arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dyexport.bundle import Bundle, ModelSpec
from dyexport.engines.base import Engine
from dyexport.engines.registry import EngineOptions, make_engine
from dyexport.errors import BundleError, UsageError
from dyexport.runtime.pipeline import BundleTransformer

if TYPE_CHECKING:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

DENSE = -1  # the segment index of the dense baseline

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


@dataclass(frozen=True)
class DenseGraph:
    """The bundle's dense graph as a transformer that sampling loops can call."""

    engine: Engine
    device: str = "cpu"

    @classmethod
    def of(cls, bundle: Bundle, target: str, device: str = "cpu") -> DenseGraph:
        """Raises ``BundleError`` where the bundle was built without its baseline."""
        path = bundle.engine_paths(target).get(DENSE)
        if path is None:
            raise BundleError(f"{bundle.root} has no dense {target!r} graph to compare with; build the bundle again")
        return cls(make_engine(target, path, EngineOptions(device=device)), device)

    def __call__(self, *, hidden_states: Any, timestep: Any, class_labels: Any) -> Transformer2DModelOutput:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        inputs = {"hidden_states": hidden_states, "timestep": timestep, "class_labels": class_labels}
        return Transformer2DModelOutput(sample=self.engine.run(inputs)["sample"])


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
