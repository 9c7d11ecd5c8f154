"""Compilers of TensorRT plans, classic or RTX, from ONNX graphs, and of Torch-TensorRT programs, from modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyexport.bundle.plan_info import INFO, Flavour, PlanInfo
from dyexport.compilation.base import EngineJob
from dyexport.errors import EngineMismatchError
from dyexport.exporters.tensorrt_plan import PlanRequest, build_plan
from dyexport.exporters.tensorrt_profiles import TensorrtSettings, plan_request
from dyexport.progress import Progress
from dyexport.stages.file_records import digest_of
from dyexport.tensorrt_api import Api, load_api


@dataclass(frozen=True, kw_only=True)
class TensorRtCompiler:
    """Compiler of TensorRT plans; ``timings`` is the folder in which timings of kernels are kept."""

    target: Flavour
    settings: TensorrtSettings
    timings: Path

    @property
    def api(self) -> Api:
        return load_api(self.target)

    @property
    def parallel(self) -> bool:
        return not self.api.measures

    def version(self) -> str:
        return self.api.version

    def inputs(self, job: EngineJob) -> Mapping[str, Any]:
        inputs = {"request": digest_of(repr(self.request(job)))}
        return {**inputs, "gpu": self.api.own_capabilities()} if self.api.measures else inputs

    def is_current(self, job: EngineJob, engine: Path) -> bool:
        return is_current(self.request(job), self.api, job.graph_sha256, engine)

    def compile(self, job: EngineJob, out: Path, progress: Progress) -> None:
        timings = self.timings / f"{self.target}-{self.version()}"
        build_plan(job.graph, self.request(job), out, timings, progress=progress)

    def request(self, job: EngineJob) -> PlanRequest:
        return plan_request(self.settings, self.target, job.networks.spec, job.segment, job.io.inputs)


def is_current(request: PlanRequest, api: Api, graph_sha256: str, engine: Path) -> bool:
    """Tell whether the description next to an engine is of this request, builder, GPU and graph."""
    try:
        info = PlanInfo.read(engine.with_name(INFO))
    except EngineMismatchError:
        return False
    requested = {
        "flavour": request.flavour,
        "version": api.version,
        "compute_capabilities": request.compute_capabilities or api.own_capabilities(),
        "precision": request.precision,
        "streamable": request.stream_weights,
        "profiles": tuple(dict(profiles) for profiles in request.profiles),
        "inputs": request.inputs,
        "graph_sha256": graph_sha256,
    }
    return info == info.model_copy(update=requested)


@dataclass(frozen=True, kw_only=True)
class TorchTensorRtCompiler:
    """Compiler of Torch-TensorRT programs. Untested on a GPU."""

    settings: TensorrtSettings
    target: Flavour = "torch-tensorrt"
    parallel: bool = False

    def version(self) -> str:
        return load_api(self.target).version

    def inputs(self, job: EngineJob) -> Mapping[str, Any]:
        return {"request": digest_of(repr(self.request(job))), "gpu": load_api(self.target).own_capabilities()}

    def is_current(self, job: EngineJob, engine: Path) -> bool:
        return is_current(self.request(job), load_api(self.target), job.graph_sha256, engine)

    def compile(self, job: EngineJob, out: Path, progress: Progress) -> None:
        from dyexport.compilation.modules import slim_module
        from dyexport.exporters.torch_program import build_program

        module = slim_module(job.networks, job.network, job.graph)
        build_program(module.slice, module.offsets, module.store, self.request(job), job.graph_sha256, out)

    def request(self, job: EngineJob) -> PlanRequest:
        return plan_request(self.settings, self.target, job.networks.spec, job.segment, job.io.inputs)
