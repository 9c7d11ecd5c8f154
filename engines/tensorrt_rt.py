"""TensorRT plans on an NVIDIA GPU, classic and RTX. Untested on a GPU: no machine of this project has one.

Everything up to ``activate`` needs no device: bindings, sizes and whether a plan fits a machine follow from
its description. Inputs and outputs are torch tensors bound where they lie, and all engines of a process take
turns in one block of activation memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.errors import EngineMismatch, MissingDependency
from dyexport.plans import INFO, PlanInfo, Profile
from dyexport.tensorrt_api import BuildLog, load_api

if TYPE_CHECKING:
    import torch


class TensorRtEngine(Engine):
    """Runs one plan. ``path`` is ``engine.plan``; its description stands beside it."""

    def __init__(self, path: Path, *, device: str = "cuda") -> None:
        self.path = path
        self.device = device
        self._engine: Any = None
        self._context: Any = None
        self._profile = -1

    @cached_property
    def info(self) -> PlanInfo:
        return PlanInfo.read(self.path.with_name(INFO))

    @cached_property
    def io(self) -> EngineIO:
        return EngineIO(inputs=self.info.inputs, outputs=self.info.outputs)

    @property
    def weights(self) -> tuple[WeightSpan, ...]:
        return (WeightSpan(path=self.path, offset=0, length=self.path.stat().st_size),)

    @property
    def shares_weights(self) -> bool:
        return False

    @property
    def active(self) -> bool:
        return self._context is not None

    def activate(self) -> None:
        """Raises ``EngineMismatch`` for a plan of another GPU or version, ``MissingDependency`` without its runtime."""
        if self._context is not None:
            return
        if (reason := unfit(self.info)) is not None:
            raise EngineMismatch(f"{self.path}: {reason}")
        api = load_api(self.info.flavour)
        log = BuildLog(api.trt)
        self._engine = api.trt.Runtime(log.logger).deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise log.failure(f"{self.info.flavour} cannot load {self.path}")
        strategy = api.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = self._engine.create_execution_context(strategy)
        self._profile = -1

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        import torch

        symbols = self.io.check(inputs)
        profile = choose_profile(self.info.profiles, symbols)
        self.activate()
        shapes = self.io.output_shapes(symbols)
        outputs = {
            spec.name: torch.empty(shapes[spec.name], dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in self.info.outputs
        }
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._select(profile, stream)
        held = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        names = self._bindings
        for name, tensor in held.items():
            if name in names:  # TensorRT drops an input that nothing reads
                self._context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in {**held, **outputs}.items():
            if name in names:
                self._context.set_tensor_address(name, tensor.data_ptr())
        self._context.device_memory = ACTIVATIONS.address(self._engine.device_memory_size_v2, self.device)
        if not self._context.execute_async_v3(stream):
            raise EngineMismatch(f"{self.info.flavour} cannot run {self.path} with {symbols}")
        return outputs

    @property
    def _bindings(self) -> set[str]:
        return {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}

    def _select(self, profile: int, stream: int) -> None:
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, stream)
            self._profile = profile

    def close(self) -> None:
        self._context = self._engine = None


class ActivationMemory:
    """One block a device, as large as the largest engine needs: engines of one stream run one after another."""

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def address(self, size: int, device: str) -> int:
        import torch

        block = self._blocks.get(device)
        if block is None or block.numel() < size:
            block = self._blocks[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return block.data_ptr()


ACTIVATIONS = ActivationMemory()


def unfit(info: PlanInfo) -> str | None:
    """Why a plan cannot run here, with the cure; None where it can."""
    import torch

    if not torch.cuda.is_available():
        return f"{info.flavour} plans run on NVIDIA GPUs and torch sees none; load the bundle with target='onnx'"
    try:
        version = load_api(info.flavour).version
    except MissingDependency as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability()
    return misfit(info, version, f"{major}.{minor}")


def misfit(info: PlanInfo, version: str, capability: str) -> str | None:
    """What does not fit between a plan and a machine with this TensorRT and this GPU; None where all does."""
    if info.version != version:
        return f"built by {info.flavour} {info.version}, and {version} is installed; build the bundle again here"
    if info.compute_capabilities and capability not in info.compute_capabilities:
        built = ", ".join(info.compute_capabilities)
        return f"built for compute capability {built}, and this GPU has {capability}; build with --compute-capability"
    return None


def choose_profile(profiles: tuple[Mapping[str, Profile], ...], symbols: Mapping[str, int]) -> int:
    """The first profile that holds these sizes, of those the one built nearest to them. Raises ``EngineMismatch``."""
    fitting = [index for index, profile in enumerate(profiles) if _holds(profile, symbols)]
    if not fitting:
        sizes = ", ".join(f"{name} = {size}" for name, size in symbols.items())
        ranges = "; ".join(", ".join(f"{n} {p.min} to {p.max}" for n, p in each.items()) for each in profiles)
        raise EngineMismatch(f"{sizes} fits no profile of this plan ({ranges}); build with --profile for such sizes")
    return min(fitting, key=lambda index: sum(abs(profiles[index][s].opt - size) for s, size in _own(symbols).items()))


def _holds(profile: Mapping[str, Profile], symbols: Mapping[str, int]) -> bool:
    return all(profile[name].min <= size <= profile[name].max for name, size in _own(symbols).items())


def _own(symbols: Mapping[str, int]) -> dict[str, int]:
    """Sizes by the name of a profile: ``2*height`` counts as half as much ``height``."""
    split = {symbol: symbol.rpartition("*") for symbol in symbols}
    return {name: symbols[symbol] // int(factor or 1) for symbol, (factor, _, name) in split.items()}
