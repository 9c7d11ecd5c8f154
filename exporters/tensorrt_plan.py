"""Build TensorRT plans, classic or RTX, from ONNX graphs, with profiles for every dynamic dimension.

The graph is the file that ONNX Runtime runs and that ``verify`` checks; only the form of its attention may change.
Networks are strongly typed: a plan computes in the precision of its graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyexport.bundle.graph_forms import AttentionForm
from dyexport.bundle.onnx_schema import MESSAGES, tensor_spec
from dyexport.bundle.plan_info import ENGINE, INFO, Flavour, PlanInfo, Profile
from dyexport.bundle.tensors import TensorSpec
from dyexport.digests import sha256_of
from dyexport.errors import EngineBuildError
from dyexport.exporters.operator_gate import check_operators
from dyexport.exporters.tensorrt_attention import allow_decomposition, graph_in_form, supported_form
from dyexport.exporters.timing_cache import kept_timings
from dyexport.progress import Progress
from dyexport.tensorrt_api import Api, BuildLog, load_api

Profiles = Mapping[str, Profile]
"""By symbol: ``height`` for a dimension of ``height`` or ``2*height``."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A plan to build. ``compute_capabilities`` are such as 8.9, for RTX; none means all that its builder supports.

    ``profiles``, one optimization profile each, name every symbol of ``inputs``. ``largest_topk`` is the most
    tokens that a block may be asked to keep. With ``stream_weights``, those that do not fit on the device may stay in
    host memory. ``attention`` is the form of attention in the network; None selects what the builder supports.
    """

    flavour: Flavour
    inputs: tuple[TensorSpec, ...]
    profiles: tuple[Profiles, ...]
    precision: str
    compute_capabilities: tuple[str, ...] = ()
    largest_topk: int = 0
    stream_weights: bool = False
    attention: AttentionForm | None = None


def build_plan(
    graph: Path, request: PlanRequest, out: Path, timings: Path | None = None, *, progress: Progress | None = None
) -> PlanInfo:
    """Write the plan of a graph and its description into the directory ``out``; ``timings`` is a cache of kernels.

    Raises ``EngineBuildError`` that names the node, the dimension or the builder's reason, and
    ``MissingDependencyError`` where the flavour is not installed.
    """
    model = MESSAGES["ModelProto"].FromString(graph.read_bytes())
    check_operators(
        model,
        request.flavour,
        largest_topk=request.largest_topk,
        compute_capabilities=request.compute_capabilities,
    )
    api = load_api(request.flavour)
    log = BuildLog(api.trt)
    builder = api.trt.Builder(log.logger)
    network, parser = _parse(api, builder, log, graph, request.attention)
    config = _configure(api, builder, network, request, progress)
    with kept_timings(api, config, timings):
        plan = builder.build_serialized_network(network, config)
    del parser  # it owns the weights that the network refers to, so it must live until here
    if plan is None:
        raise log.failure(f"{request.flavour} cannot build {graph.name}")
    out.mkdir()
    (out / ENGINE).write_bytes(memoryview(plan))
    info = PlanInfo(
        flavour=request.flavour,
        version=api.version,
        compute_capabilities=request.compute_capabilities or api.own_capabilities(),
        precision=request.precision,
        streamable=request.stream_weights,
        profiles=tuple(dict(profiles) for profiles in request.profiles),
        inputs=request.inputs,
        outputs=tuple(tensor_spec(value) for value in model.graph.output),
        layers=tuple(_describe(network.get_layer(index)) for index in range(network.num_layers)),
        graph_sha256=sha256_of(graph),
        plan_sha256=sha256_of(out / ENGINE),
    )
    (out / INFO).write_text(info.model_dump_json(indent=1), encoding="utf-8")
    return info


def _parse(api: Api, builder: Any, log: BuildLog, graph: Path, attention: AttentionForm | None) -> tuple[Any, Any]:
    """Return the network, and the parser that owns its weights."""
    trt = api.trt
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # all networks of RTX are
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(graph_in_form(graph, attention or supported_form(trt)), str(graph)):
        error = parser.get_error(0)
        raise EngineBuildError(f"{api.flavour} cannot read {graph.name}: {error.desc()} at node {error.node_name()!r}")
    allow_decomposition(trt, network)
    return network, parser


def _configure(api: Api, builder: Any, network: Any, request: PlanRequest, progress: Progress | None) -> Any:
    trt = api.trt
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that an inspector can name layers
    if request.stream_weights:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for profiles in request.profiles:
        config.add_optimization_profile(_profile(builder, network, request.inputs, profiles))
    if request.compute_capabilities:
        config.num_compute_capabilities = len(request.compute_capabilities)
        for index, text in enumerate(request.compute_capabilities):
            config.set_compute_capability(api.capability(text), index)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    return config


def _profile(builder: Any, network: Any, inputs: tuple[TensorSpec, ...], profiles: Profiles) -> Any:
    """Make one optimization profile. Raises ``EngineBuildError`` for a symbol without sizes."""
    taken = {network.get_input(index).name for index in range(network.num_inputs)}  # a folded input is gone
    profile = builder.create_optimization_profile()
    for spec in inputs:
        if spec.name in taken and any(isinstance(size, str) for size in spec.shape):
            ranges = [size_range(size, spec, profiles) for size in spec.shape]
            profile.set_shape(spec.name, *zip(*((r.min, r.opt, r.max) for r in ranges), strict=True))
    return profile


def size_range(size: int | str, spec: TensorSpec, profiles: Profiles) -> Profile:
    """Return the sizes of one dimension of an input. Raises ``EngineBuildError`` for a symbol without sizes."""
    if isinstance(size, int):
        return Profile(min=size, opt=size, max=size)
    factor, _, symbol = size.rpartition("*")
    if symbol not in profiles:
        raise EngineBuildError(f"no sizes for {symbol!r} of {spec.name}; give --profile {symbol}=MIN:OPT:MAX")
    return profiles[symbol].times(int(factor or 1))


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                progress(step, self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _describe(layer: Any) -> str:
    return f"{layer.type.name.lower()} {layer.name}"
