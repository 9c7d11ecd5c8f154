"""``load`` opens a bundle as an object that stands in for ``transformer`` in diffusers' pipelines."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dyexport.bundle import CONDITIONING, DENSE, DENSE_CONDITIONING, Bundle, ModelSpec, segment_name
from dyexport.engines.registry import EngineOptions, get_backend, make_engine
from dyexport.engines.switching import SwitchingEngine
from dyexport.errors import BundleError, EngineMismatch, UsageError
from dyexport.runtime.conditioning import Conditioner
from dyexport.runtime.overflow import Overflow, OverflowCounter
from dyexport.runtime.placeholder import offloading_placeholder
from dyexport.runtime.residency import Residency, measure
from dyexport.runtime.scheduler import Scheduler, dense_route, route, shared_timestep

DIT_PIPELINE_NULL_CLASS = 1000  # what diffusers' DiTPipeline gives as "no class", whatever the model's classes


class BundleTransformer(torch.nn.Module):
    """The denoising network of a bundle. Engines hold the weights; the module has none.

    ``forward`` has the signature of diffusers' ``DiTTransformer2DModel``. Tensors come back on the
    device and in the dtype they came in; the engines stay where they were loaded, so a pipeline's
    ``to`` and its offloading pass over this module. Calls from several threads run one after another.
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
        self.dtype = torch.float32
        self.device = device
        self._scheduler = scheduler
        self._overflow = OverflowCounter()
        self._step_seconds = 0.0
        self._lock = Lock()
        self.placeholder = offloading_placeholder()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the noise, or the velocity, of latents (B, C, H, W) with labels (B,) at one t: (B, C_out, H, W).

        ``timestep`` is a number, () or (B,) with equal values, of any dtype. ``cross_attention_kwargs``
        has nothing to act on. Raises ``EngineMismatch`` for inputs this bundle was not built for.
        """
        if timestep is None or class_labels is None:
            raise EngineMismatch(f"timestep and class_labels are required; label {self.spec.classes} means no class")
        with self._lock:
            begin = perf_counter()
            sample = self._step(hidden_states, timestep, class_labels)
            self._step_seconds += perf_counter() - begin
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _step(self, latents: torch.Tensor, timestep: torch.Tensor | float, labels: torch.Tensor) -> torch.Tensor:
        t = shared_timestep(timestep, len(latents))
        step = self._scheduler.step(t)
        inputs = {
            "hidden_states": latents.to(self.device, self.dtype),  # (B, C, H, W)
            "modulation": self.conditioner.at(t, {"class_labels": self._labels(labels)}),  # (B, M)
        }
        outputs = self.engine.run_on(step.choice, inputs)
        if step.token_limits is not None:
            self._overflow.add(outputs["kept_tokens"], step.token_limits)
        return outputs["sample"].to(latents.device, latents.dtype)  # (B, C_out, H, W)

    def _labels(self, labels: torch.Tensor) -> torch.Tensor:
        labels = labels.to(self.device, torch.int64)  # (B,)
        if self.spec.classes < DIT_PIPELINE_NULL_CLASS:
            labels = labels.masked_fill(labels == DIT_PIPELINE_NULL_CLASS, self.spec.classes)
        return labels

    @property
    def residency(self) -> Residency:
        """Bytes resident now, and what each switch has cost so far."""
        with self._lock:
            return measure(self.engine, self.conditioner.engine, step_seconds=self._step_seconds)

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
) -> BundleTransformer:
    """Open a bundle to run it.

    ``device`` is ``cpu``, ``cuda`` or ``cuda:N``, by default CUDA where torch and the backend have it.
    ``max_resident`` bounds how many engines are in memory at a time (default: all; the conditioning engine
    then leaves as soon as it has run), ``share_weights`` lets them map one copy of the weights. ``dense``
    opens the static model that a bundle keeps for comparison. No weights are read into memory before the
    first call.

    Raises ``BundleError`` for a damaged bundle, ``EngineMismatch`` for a target it was not built for,
    ``UsageError`` for an argument out of range, ``MissingDependency`` for an absent backend.
    """
    # Only a graph is data: the engines of every other target are code, and run only as they were built.
    bundle = Bundle.open(bundle_path, check_hashes=check_hashes or target != "onnx")
    paths, spec = _engine_paths(bundle, target, dense), bundle.manifest.model
    *networks, conditioning = paths
    options = EngineOptions(device=_device(target, device), share_weights=share_weights)
    find = dense_route if dense else partial(route, bundle.manifest.plan, bundle.widths, bundle.token_stats)
    scheduler = Scheduler(find, options.device)
    engine = SwitchingEngine(
        [make_engine(target, path, options) for path in networks],
        scheduler.choose,
        ahead=-1 if spec.objective == "ddpm" else 1,  # sampling goes from noise to data: t falls, or rises
        max_resident=max_resident,
    )
    conditioner = Conditioner(make_engine(target, conditioning, options), resident=max_resident is None)
    return BundleTransformer(spec, engine, conditioner, scheduler, torch.device(options.device))


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
