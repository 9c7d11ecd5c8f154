"""``load`` opens a bundle as an object that stands in for ``transformer`` in diffusers' pipelines."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from dyexport.arguments import shown, whole_number
from dyexport.bundle import Bundle
from dyexport.engines.base import Tensors
from dyexport.engines.registry import EngineOptions, get_backend, make_engines
from dyexport.engines.switching import SwitchingEngine
from dyexport.errors import BundleError, UsageError
from dyexport.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING, ModelSpec, segment_name
from dyexport.runtime.conditioning import Conditioner
from dyexport.runtime.memory import Placement, WeightBytes, place
from dyexport.runtime.overflow import Overflow, OverflowCounter
from dyexport.runtime.placeholder import offloading_placeholder
from dyexport.runtime.residency import Residency, distinct_bytes, measure
from dyexport.runtime.scheduler import Scheduler, dense_route, route, shared_timestep
from dyexport.sizes import check_memory


class BundleTransformer(ModelMixin):
    """The denoising network of a bundle. Engines hold the weights; the module has none.

    A subclass for each backbone has the ``forward`` of its diffusers transformer. Tensors come back on
    the device and in the dtype they came in; the engines stay where they were loaded, so a pipeline's
    ``to`` and its offloading pass over this module. Calls from several threads run one after another.
    A ``ModelMixin``, because ``from_pretrained(..., transformer=)`` of a pipeline takes nothing else.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engine: SwitchingEngine,
        conditioner: Conditioner,
        scheduler: Scheduler,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.config = FrozenDict(spec.config)
        self.engine = engine
        self.conditioner = conditioner
        self._device = device
        self._scheduler = scheduler
        self._overflow = OverflowCounter()
        self._step_seconds = 0.0
        self._lock = Lock()
        self.placeholder = offloading_placeholder()

    @property
    def device(self) -> torch.device:
        """Where the engines are."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Of the engines' inputs and outputs."""
        return torch.float32

    def denoise(self, timestep: torch.Tensor | float, inputs: Tensors, conditions: Tensors) -> torch.Tensor:
        """One call of the network on this bundle's device.

        ``inputs`` change from step to step or are fixed (latents, text); ``conditions`` (B, ...) reach the
        network through its conditioning only. ``timestep`` is a number, () or (B,) with equal values.
        """
        with self._lock:
            begin = perf_counter()
            sample = self._step(timestep, inputs, conditions)
            self._step_seconds += perf_counter() - begin
        return sample

    def _step(self, timestep: torch.Tensor | float, inputs: Tensors, conditions: Tensors) -> torch.Tensor:
        latents = inputs["hidden_states"]
        t = shared_timestep(timestep, len(latents))
        step = self._scheduler.step(t)
        moved = {name: self._take(tensor) for name, tensor in inputs.items()}
        conditions = {name: self._take(tensor) for name, tensor in conditions.items()}
        outputs = self.engine.run_on(step.choice, {**moved, "modulation": self.conditioner.at(t, conditions)})
        if step.token_limits is not None:
            self._overflow.add(outputs["kept_tokens"], step.token_limits)
        return outputs["sample"].to(latents.device, latents.dtype)

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    @property
    def residency(self) -> Residency:
        """Bytes resident now, and what each switch has cost so far."""
        with self._lock:
            return measure(self.engine, self.conditioner, step_seconds=self._step_seconds)

    @property
    def overflow(self) -> Overflow:
        """How often a block's router wanted more tokens than the block's capacity."""
        with self._lock:
            return self._overflow.read()

    def close(self) -> None:
        """Free the engines; a later call loads them again."""
        with self._lock:
            self.engine.close()
            self.conditioner.close()


def load(
    bundle_path: str | Path,
    *,
    target: str = "onnx",
    device: str | torch.device | None = None,
    max_resident: int | None = None,
    memory: int | str | None = None,
    share_weights: bool = False,
    check_hashes: bool = True,
    dense: bool = False,
    fallback: bool = True,
) -> BundleTransformer:
    """Open a bundle to run it.

    ``target`` is one that the bundle was built for, or ``onnx-rtx``: its ONNX graphs on TensorRT-RTX through ONNX
    Runtime. ``device`` is ``cpu``, ``cuda`` or ``cuda:N``, by default CUDA where torch and the backend have it.
    ``max_resident`` bounds how many engines are in memory at a time (default: all; otherwise the conditioning
    engine leaves as soon as it has run). ``memory``, bytes or such as ``"8GiB"``, bounds the weights instead: it
    decides how many engines stay, and whether their weights are streamed where a backend can; activations come on
    top. ``share_weights`` lets engines map one copy of the weights. ``dense`` opens the static model that a bundle
    keeps for comparison. No weights are read into memory before the first call. What does not fit this machine is
    left alone: ONNX Runtime takes over, with a warning that says why, unless ``fallback`` is off. For a TensorRT-RTX
    plan its graph is compiled anew where ``onnx-rtx`` runs.

    Raises ``BundleError`` for a damaged bundle, ``EngineMismatch`` for a target it was not built for,
    ``UsageError`` for an argument out of range, ``MissingDependency`` for an absent backend.
    """
    max_resident, budget = _bounds(max_resident, memory)
    bundle, opened = _open(bundle_path, target, check_hashes=check_hashes, dense=dense, fallback=fallback)
    options = EngineOptions(device=_device(opened.target, device), share_weights=share_weights)
    placement = _place(opened, options, max_resident, budget)
    options = replace(options, streaming_budget=placement.streaming_budget)
    *engines, conditioning = make_engines(opened.target, opened.paths, options)
    find = dense_route if dense else partial(route, bundle.manifest.plan, bundle.widths, bundle.token_stats)
    scheduler, spec = Scheduler(find, options.device), bundle.manifest.model
    engine = SwitchingEngine(
        engines,
        scheduler.choose,
        ahead=1 if spec.objective == "flow" else -1,  # sampling goes from noise to data: t rises, or falls
        max_resident=placement.max_resident,
    )
    conditioner = Conditioner(conditioning, resident=placement.max_resident is None, device=options.device)
    return get_transformer(spec.backbone)(spec, engine, conditioner, scheduler, torch.device(options.device))


class _Opened(NamedTuple):
    """What runs, and its files: engines in the order of t, and last their conditioning network."""

    target: str
    paths: list[Path]


def _open(path: str | Path, target: str, *, check_hashes: bool, dense: bool, fallback: bool) -> tuple[Bundle, _Opened]:
    """The bundle, and the engines that fit this machine."""
    files = get_backend(target).files or target
    # Only a graph is data: the engines of every other target are code, and run only as they were built.
    bundle = Bundle.open(path, check_hashes=check_hashes or files != "onnx")
    opened = _Opened(target, _engine_paths(bundle, files, dense))
    if not fallback or (reason := _unfit(opened)) is None:
        return bundle, opened
    while _unfit(opened) is not None:
        opened = _Opened(get_backend(opened.target).fallback, _engine_paths(bundle, "onnx", dense))
    warnings.warn(f"{bundle.root}: {reason}; running its ONNX graphs as target {opened.target!r}", stacklevel=3)
    return bundle, opened


def _unfit(opened: _Opened) -> str | None:
    return get_backend(opened.target).unfit(opened.paths[0])


def _bounds(max_resident: int | None, memory: int | str | None) -> tuple[int | None, int | None]:
    """Engines and bytes, checked."""
    if max_resident is not None and memory is not None:
        raise UsageError(f"max_resident is {max_resident} and memory {memory!r}; give one of the two")
    if max_resident is not None:
        max_resident = whole_number("max_resident", max_resident, least=1, most=sys.maxsize, cure="give 1 or more")
    return max_resident, None if memory is None else check_memory(memory)


def _place(opened: _Opened, options: EngineOptions, max_resident: int | None, memory: int | None) -> Placement:
    if memory is None:
        return Placement(max_resident=max_resident)
    return place(_weight_bytes(opened, options), memory)


def _weight_bytes(opened: _Opened, options: EngineOptions) -> WeightBytes:
    made = make_engines(opened.target, opened.paths, options)
    *engines, conditioning = (distinct_bytes(engine.weights) for engine in made)
    shared = distinct_bytes(span for engine in made for span in engine.weights)
    return WeightBytes(
        engines=tuple(engines),
        conditioning=conditioning,
        together=shared if all(engine.shares_weights for engine in made) else sum(engines) + conditioning,
        streamable=all(map(get_backend(opened.target).streams, opened.paths)),
    )


def get_transformer(backbone: str) -> type[BundleTransformer]:
    """The stand-in with the ``forward`` of a backbone's diffusers transformer."""
    from dyexport.runtime.transformers import TRANSFORMERS

    if backbone not in TRANSFORMERS:
        raise BundleError(f"this dyexport runs {', '.join(TRANSFORMERS)}, not {backbone!r}; upgrade dyexport")
    return TRANSFORMERS[backbone]


def _engine_paths(bundle: Bundle, target: str, dense: bool) -> list[Path]:
    """Engines in the order of t, and last their conditioning network."""
    paths = bundle.engine_paths(target)
    own = DENSE_CONDITIONING if dense and DENSE_CONDITIONING in paths else CONDITIONING
    networks = [DENSE] if dense else [segment_name(index) for index in range(len(bundle.manifest.plan.segments))]
    missing = [name for name in (*networks, own) if name not in paths]
    if missing:
        raise BundleError(f"{bundle.root} has no {target!r} engine {missing[0]!r}; build the bundle again")
    return [paths[name] for name in (*networks, own)]


def _device(target: str, device: str | torch.device | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() and get_backend(target).has_cuda() else "cpu"
    name = str(device)
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if found is None:
        raise UsageError(f"unknown device {shown(name)!r}; use cpu, cuda or cuda:N")
    if name == "cpu":
        return name
    if (count := torch.cuda.device_count()) <= int(found[1] or 0):
        raise UsageError(f"device is {name!r} and torch sees {count} CUDA devices; use cpu, or install torch for CUDA")
    if not get_backend(target).has_cuda():
        raise UsageError(f"device is {name!r} and this machine's {target!r} runs on the CPU alone; use cpu")
    return name
