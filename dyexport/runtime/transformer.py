"""A bundle as a component of diffusers' pipelines, which ``dyexport.load`` returns."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from diffusers import ConfigMixin, ModelMixin
from pydantic import ByteSize

from dyexport.arguments import check_budget
from dyexport.bundle.manifest_file import manifest_text
from dyexport.bundle.reader import Bundle, root_at
from dyexport.bundle.spec import ModelSpec
from dyexport.engines.base import Tensors
from dyexport.engines.switching import SwitchingEngine
from dyexport.errors import BundleError, UsageError
from dyexport.runtime.conditioning import Conditioner
from dyexport.runtime.diffusers_options import WEIGHT_OPTIONS, check_options, one_device
from dyexport.runtime.fixed_network import FixedNetwork
from dyexport.runtime.forked import skip_exit_handlers_of_parent
from dyexport.runtime.inputs import check_no_gradients, for_engine, one_batch
from dyexport.runtime.locating import find_bundle
from dyexport.runtime.overflow import Overflow, OverflowCounter
from dyexport.runtime.residency import Residency, measure, weight_bytes
from dyexport.runtime.routing import MODULATION, RouteCache, shared_timestep
from dyexport.runtime.saving import save_bundle
from dyexport.runtime.stock import EqualsStock

# Dynamo would find nothing to compile, and recompile for each clock reading. diffusers has already imported it.
NOT_COMPILED = torch.compiler.disable(reason="the layers of a bundle are inside engines")


def offloading_placeholder(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """Make a parameter without elements: accelerate's offloading reads a module's device from its first parameter."""
    return torch.nn.Parameter(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)


OF_ONE_BUDGET = ("_bundle", "_start", "engine", "conditioner", "_routes", "_overflow", "_step_seconds")
"""Attributes of a transformer that another budget has others of."""


class Running(NamedTuple):
    """State of one process: engines, and the threads that activate them."""

    engine: SwitchingEngine
    conditioner: Conditioner
    routes: RouteCache


class BundleTransformer(FixedNetwork, ModelMixin, ConfigMixin, metaclass=EqualsStock):
    """The denoising network of a bundle. Engines hold the weights; the module has none.

    Each backbone has a subclass, which also inherits from its diffusers transformer and has its ``forward``.

    ``dtype`` is the dtype in which a pipeline makes latents. ``load(dtype=)`` and ``to`` set it, and it changes no
    engine. Outputs have the dtype and the device of the latents. The engines stay on the device where they were loaded:
    a pipeline's ``to`` and its offloading do not move them.

    Calls from several threads run one after another. Copies, pickles and forked processes open the bundle again, with
    separate engines.
    """

    stock: ClassVar[type[torch.nn.Module] | None] = None

    def __init__(
        self,
        bundle: Bundle,
        start: Callable[[], Running],
        reopen: Callable[..., BundleTransformer],
        *,
        target: str,
        device: torch.device,
        dtype: torch.dtype,
        keep_budgets: bool = True,
    ) -> None:
        ModelMixin.__init__(self)  # not the stock class's: that makes all its layers
        self.spec = bundle.manifest.model
        self.register_to_config(**{**_defaults(self.stock), **self.spec.config})
        self._bundle = bundle
        self._start = start
        self._reopen = reopen
        self._keep_budgets = keep_budgets
        self._others: dict[float, BundleTransformer] = {}  # opened for other budgets
        self._target = target
        self._device = device
        self.placeholder = offloading_placeholder(dtype)
        self.eval()
        self._begin()
        _LOADED.add(self)

    def _begin(self) -> None:
        self.engine, self.conditioner, self._routes = self._start()
        self._overflow = OverflowCounter()
        self._step_seconds = 0.0
        self._lock = Lock()

    def begin_in_forked_process(self) -> None:
        """Start again with new engines: locks and threads of the parent process do not work here.

        The parent's engines are never freed here, because freeing a session waits for its threads.
        """
        _LEFT_BEHIND.append((self.engine, self.conditioner))
        self._begin()

    @classmethod
    def check_spec(cls, spec: ModelSpec) -> None:
        """Raise ``BundleError`` for a model whose specification contradicts its configuration."""

    @classmethod
    def example_inputs(cls, spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
        """Make noise and random conditions at one t, as the stock module's arguments."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., BundleTransformer], tuple[Any, ...]]:
        return _opened_again, (self._reopen, self._bundle.root, self.dtype, _fingerprint(self._bundle))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}, since its layers are inside engines; "
                "use the diffusers transformer where they are needed"
            ) from None

    def __repr__(self) -> str:
        manifest, count = self._bundle.manifest, len(self.engine.engines)
        budget = "" if manifest.budget is None else f", built for {manifest.budget:g}"
        static = ", static widths" if manifest.widths == "static" else ""
        engines = f"{count} engine{'s' if count > 1 else ''} in {self.spec.number_formats}"
        resident = ByteSize(weight_bytes(self.engine, self.conditioner)).human_readable(decimal=True)
        return (
            f"{type(self).__name__}({self.spec.name!r}, target {self._target!r} on {str(self.device)!r},\n"
            f"  {engines}, {resident} of weights resident,\n"
            f"  FLOPs ratio {manifest.plan.flops_ratio:.3f}{budget}{static})"
        )

    @property
    def budgets(self) -> tuple[float, ...]:
        """FLOPs budgets that the bundle has engines for, ascending."""
        return self._bundle.budgets

    @property
    def budget(self) -> float | None:
        """FLOPs budget whose engines run; None for the routers of a checkpoint.

        Setting it to another of ``budgets`` switches all engines, between two calls. Those of the earlier budget stay
        in memory until ``close``, so that switching back loads nothing, unless the transformer was loaded with
        ``memory`` or ``max_resident``. Raises ``UsageError`` for any other value.
        """
        return self._bundle.manifest.budget

    @budget.setter
    def budget(self, budget: float) -> None:
        with self._lock:
            if (chosen := check_budget(budget)) != self.budget:
                self._switch_to(chosen)

    def _switch_to(self, budget: float) -> None:
        other = self._others.pop(budget, None)
        if other is None:
            other = self._reopen(root_at(self._bundle.root, budget), dtype=self.dtype)
        for name in OF_ONE_BUDGET:
            self.__dict__[name], other.__dict__[name] = other.__dict__[name], self.__dict__[name]
        if not self._keep_budgets:
            other.close()
        elif other.budget is not None:
            self._others[other.budget] = other

    @property
    def device(self) -> torch.device:
        """Device of the engines."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which pipelines make latents; engines take any."""
        return self.placeholder.dtype

    def denoise(
        self,
        timestep: torch.Tensor | float,
        inputs: Tensors,
        conditions: Tensors,
        shared: Tensors | None = None,
    ) -> torch.Tensor:
        """Run the network once on this bundle's device, and return its output (B, ...).

        timestep    a number, () or (B,) with equal values
        inputs      (B, ...) inputs of the network itself: latents, text
        conditions  (B, ...) inputs of its conditioning alone: labels, pooled text
        shared      inputs of the network without a batch: positions

        A tensor of one sample stands for all of the batch. Raises ``EngineMismatchError``.
        """
        check_no_gradients({**inputs, **conditions})
        batched = one_batch(timestep, {**inputs, **conditions})
        inputs = {name: batched[name] for name in inputs} | dict(shared or {})
        conditions = {name: batched[name] for name in conditions}
        t = shared_timestep(timestep, len(batched["hidden_states"]))
        with self._lock:
            begin = perf_counter()
            sample = self._step(t, inputs, conditions)
            self._step_seconds += perf_counter() - begin
        return sample

    def _step(self, t: float, inputs: Tensors, conditions: Tensors) -> torch.Tensor:
        latents = inputs["hidden_states"]
        step = self._routes.at(t)
        moved = {name: for_engine(tensor, self.device) for name, tensor in inputs.items()}
        outputs = self.engine.run_on(step.choice, {**moved, MODULATION: self.conditioner.at(t, conditions)})
        if step.token_limits is not None:
            self._overflow.add(outputs["kept_tokens"], step.token_limits)
        return outputs["sample"].to(latents.device, latents.dtype)

    @property
    def residency(self) -> Residency:
        """Bytes resident now, and the cost of each switch so far."""
        with self._lock:
            return measure(self.engine, self.conditioner, step_seconds=self._step_seconds)

    @property
    def overflow(self) -> Overflow:
        """Count of calls in which a block's router kept more tokens than the block's capacity."""
        with self._lock:
            return self._overflow.read()

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the weights that are resident."""
        return self.residency.weight_bytes

    def close(self) -> None:
        """Free the engines; a later call loads them again."""
        with self._lock:
            self.engine.close()
            self.conditioner.close()
            for other in self._others.values():
                other.close()

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write a copy of the bundle, with a model card and the configuration that diffusers reads.

        An earlier bundle there is replaced. Raises ``StorageError`` for a directory that holds anything else.
        """
        check_options(options, WEIGHT_OPTIONS)
        if push_to_hub:
            raise UsageError("push_to_hub=True saves nothing; call push_to_hub(repo_id), which saves and uploads")
        if is_main_process:
            save_bundle(self._bundle, Path(save_directory), self.to_json_string())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> BundleTransformer:
        """Open a bundle as diffusers opens its models, from a directory or a hub repository.

        ``options`` are those of ``dyexport.load``. Raises what ``load`` raises, and ``BundleError`` for a bundle of
        another backbone.
        """
        from dyexport.runtime.loading import load

        path = find_bundle(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        options = {name: value for name, value in options.items() if name not in WEIGHT_OPTIONS}
        check_options(options, frozenset(inspect.signature(load).parameters))
        if device_map is not None:
            options["device"] = one_device(device_map)
        loaded = load(path, dtype=dtype or torch_dtype or torch.float32, **options)
        if not isinstance(loaded, cls):
            raise BundleError(f"{path} is a bundle of {loaded.spec.backbone}; open it with dyexport.load")
        return loaded


_LOADED: WeakSet[BundleTransformer] = WeakSet()
_LEFT_BEHIND: list[object] = []  # by the parent of a forked process


def _begin_all() -> None:
    skip_exit_handlers_of_parent()
    for transformer in list(_LOADED):
        transformer.begin_in_forked_process()


os.register_at_fork(after_in_child=_begin_all)


def _opened_again(
    reopen: Callable[..., BundleTransformer], root: Path, dtype: torch.dtype, fingerprint: str
) -> BundleTransformer:
    """Open a copy or a pickle. Raises ``BundleError`` if its directory holds another bundle by now."""
    transformer = reopen(root, dtype=dtype)
    if _fingerprint(transformer._bundle) != fingerprint:
        raise BundleError(f"{transformer._bundle.root} has changed since the original was loaded; load it again")
    return transformer


def _fingerprint(bundle: Bundle) -> str:
    return hashlib.sha256(manifest_text(bundle.manifest)).hexdigest()


def _defaults(stock: type[torch.nn.Module] | None) -> dict[str, Any]:
    """Return the defaults of a diffusers class's configuration."""
    assert stock is not None, "a backbone's class names it"
    parameters = list(inspect.signature(stock.__init__).parameters.values())
    return {parameter.name: parameter.default for parameter in parameters[1:]}  # the first is self
