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

    @classmethod
    def checked(cls, target: Flavour, settings: TensorrtSettings, timings: Path) -> TensorRtCompiler:
        """Return a compiler whose builder knows the requested compute capabilities. Raises ``UsageError``."""
        compiler = cls(target=target, settings=settings, timings=timings)
        for text in () if compiler.api.measures else settings.compute_capabilities:
            compiler.api.capability(text)
        return compiler

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

    def other_options(self, job: EngineJob, engine: Path) -> tuple[str, ...]:
        return other_options(self.request(job), self.api, engine)

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


def other_options(request: PlanRequest, api: Api, engine: Path) -> tuple[str, ...]:
    """Return the options by which an engine was compiled and that differ from the request's, as they are written."""
    try:
        info = PlanInfo.read(engine.with_name(INFO))
    except EngineMismatchError:
        return ()
    options = []
    if not api.measures and info.compute_capabilities != request.compute_capabilities:
        built_for = ",".join(info.compute_capabilities)
        options.append(f"--compute-capability {built_for}" if built_for else "no --compute-capability")
    profiles = tuple(dict(profiles) for profiles in request.profiles)
    for earlier in (each for each in info.profiles if each not in profiles):
        differing = {name: size for name, size in earlier.items() if all(size != each.get(name) for each in profiles)}
        sizes = (f"{name}={size.min}:{size.opt}:{size.max}" for name, size in (differing or earlier).items())
        options.append(f"--profile {','.join(sizes)}")
    if info.streamable and not request.stream_weights:
        options.append("--stream-weights")
    return tuple(options)


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

    def other_options(self, job: EngineJob, engine: Path) -> tuple[str, ...]:
        return other_options(self.request(job), load_api(self.target), engine)

    def compile(self, job: EngineJob, out: Path, progress: Progress) -> None:
        from dyexport.compilation.modules import slim_module
        from dyexport.exporters.torch_program import build_program

        module = slim_module(job.networks, job.network, job.graph)
        build_program(module.slice, module.offsets, module.store, self.request(job), job.graph_sha256, out)

    def request(self, job: EngineJob) -> PlanRequest:
        return plan_request(self.settings, self.target, job.networks.spec, job.segment, job.io.inputs)
