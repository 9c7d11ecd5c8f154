"""``load`` opens a bundle as an object that stands in for ``transformer`` in diffusers' pipelines."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path
from threading import Lock
from time import perf_counter

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from dyexport.bundle import CONDITIONING, DENSE, DENSE_CONDITIONING, Bundle, ModelSpec, segment_name
from dyexport.engines.base import Tensors
from dyexport.engines.registry import EngineOptions, get_backend, make_engine
from dyexport.engines.switching import SwitchingEngine
from dyexport.errors import BundleError, UsageError
from dyexport.runtime.conditioning import Conditioner
from dyexport.runtime.overflow import Overflow, OverflowCounter
from dyexport.runtime.placeholder import offloading_placeholder
from dyexport.runtime.residency import Residency, measure
from dyexport.runtime.scheduler import Scheduler, dense_route, route, shared_timestep


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
    device: str | None = None,
    max_resident: int | None = None,
    share_weights: bool = False,
    check_hashes: bool = True,
    dense: bool = False,
    fallback: bool = True,
) -> BundleTransformer:
    """Open a bundle to run it.

    ``device`` is ``cpu``, ``cuda`` or ``cuda:N``, by default CUDA where torch and the backend have it.
    ``max_resident`` bounds how many engines are in memory at a time (default: all; the conditioning engine
    then leaves as soon as it has run), ``share_weights`` lets them map one copy of the weights. ``dense``
    opens the static model that a bundle keeps for comparison. No weights are read into memory before the
    first call. TensorRT plans that do not fit this machine are left alone: ONNX Runtime takes over, with a
    warning that says why, unless ``fallback`` is off.

    Raises ``BundleError`` for a damaged bundle, ``EngineMismatch`` for a target it was not built for,
    ``UsageError`` for an argument out of range, ``MissingDependency`` for an absent backend.
    """
    # Only a graph is data: the engines of every other target are code, and run only as they were built.
    bundle = Bundle.open(bundle_path, check_hashes=check_hashes or target != "onnx")
    paths, spec = _engine_paths(bundle, target, dense), bundle.manifest.model
    if fallback and (reason := get_backend(target).unfit(paths[0])) is not None:
        warnings.warn(f"{bundle.root}: {reason}; running its ONNX graphs", stacklevel=2)
        target, paths = "onnx", _engine_paths(bundle, "onnx", dense)
    *networks, conditioning = paths
    options = EngineOptions(device=_device(target, device), share_weights=share_weights)
    find = dense_route if dense else partial(route, bundle.manifest.plan, bundle.widths, bundle.token_stats)
    scheduler = Scheduler(find, options.device)
    engine = SwitchingEngine(
        [make_engine(target, path, options) for path in networks],
        scheduler.choose,
        ahead=1 if spec.objective == "flow" else -1,  # sampling goes from noise to data: t rises, or falls
        max_resident=max_resident,
    )
    engine_of_t = make_engine(target, conditioning, options)
    conditioner = Conditioner(engine_of_t, resident=max_resident is None, device=options.device)
    return get_transformer(spec.backbone)(spec, engine, conditioner, scheduler, torch.device(options.device))


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


def _device(target: str, device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() and get_backend(target).has_cuda() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    return device
