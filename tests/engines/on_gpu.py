"""Engines on a GPU, for suites whose tensors are on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dyexport.bundle.plan_info import ENGINE, Flavour, Profile
from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.engines.registry import EngineOptions, get_backend
from dyexport.errors import EngineBuildError, MissingDependencyError
from dyexport.exporters.tensorrt_plan import PlanRequest, build_plan
from tests.engines.tiny import tiny_io, whole_segment

BATCHES = ({"batch": Profile(min=1, opt=2, max=8)},)


class OnCuda(Engine):
    """Moves tensors there and back."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    @property
    def io(self) -> EngineIO:
        return self.inner.io

    @property
    def weights(self) -> tuple[WeightSpan, ...]:
        return self.inner.weights

    @property
    def shares_weights(self) -> bool:
        return self.inner.shares_weights

    @property
    def active(self) -> bool:
        return self.inner.active

    def activate(self) -> None:
        self.inner.activate()

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        outputs = self.inner.run({name: tensor.cuda() for name, tensor in inputs.items()})
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    def park(self) -> None:
        self.inner.park()

    def close(self) -> None:
        self.inner.close()


def build_tiny_plan(graph: Path, flavour: Flavour, name: str = "plan") -> Path:
    """The plan of the hand-written network, for batches of 1 to 8. Skips the test where it cannot be built."""
    out = graph.parent / f"{name}-{flavour}"
    if not out.is_dir():
        io = tiny_io(whole_segment(gated=False))
        request = PlanRequest(flavour=flavour, inputs=io.inputs, profiles=BATCHES, precision="fp32")
        try:
            build_plan(graph, request, out)
        except (MissingDependencyError, EngineBuildError) as error:
            pytest.skip(str(error))
    return out / ENGINE


def gpu_engines(target: str, *paths: Path, cuda_graphs: bool = False) -> list[Engine]:
    """Engines of one bundle. Skips the test where this GPU or its software does not run them."""
    backend = get_backend(target)
    try:
        reason = backend.incompatibility(paths[0]) or (None if backend.has_cuda() else f"{target} has no CUDA here")
    except MissingDependencyError as error:
        reason = str(error)
    if reason is not None:
        pytest.skip(reason)
    options = EngineOptions(device="cuda", cuda_graphs=cuda_graphs)
    return [OnCuda(engine) for engine in backend.make(paths, options)]
