"""TensorRT plans on an NVIDIA GPU, classic and RTX. Untested on a GPU: no machine of this project has one.

Everything up to ``activate`` needs no device: bindings, sizes and whether a plan fits a machine follow from
its description. Inputs and outputs are torch tensors, bound in place.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.engines.base import Tensors, shape_key
from dyexport.engines.plan_engine import PlanEngine
from dyexport.engines.tensorrt_contexts import ShapedContext, Workspace
from dyexport.engines.tensorrt_fit import choose_profile, incompatibility
from dyexport.engines.tensorrt_session import Session
from dyexport.errors import EngineMismatchError

if TYPE_CHECKING:
    import torch

SHAPES = 8  # sets of input shapes that an engine keeps a context for


class TensorRtEngine(PlanEngine):
    """Engine over one plan. ``path`` is ``engine.plan``; its description is next to it.

    Engines of one ``workspace`` run one after another, in its memory and on its stream. If TensorRT can unload the
    weights of a plan, ``park`` does so, and ``activate`` copies them back on another stream while other engines run;
    otherwise ``park`` closes the engine. ``streaming_budget`` bounds the bytes of weights that stay on the
    device, for plans whose weights can be streamed.
    """

    def __init__(self, path: Path, *, workspace: Workspace, streaming_budget: int | None = None) -> None:
        self.path = path
        self._workspace = workspace
        self._streaming_budget = streaming_budget
        self._session: Session | None = None
        self._active = False
        self._contexts: OrderedDict[Any, ShapedContext] = OrderedDict()  # least recently used first
        self._loaded: torch.cuda.Event | None = None  # recorded when the weights are loaded
        self._done: torch.cuda.Event | None = None  # recorded after the last run
        workspace.join(self)

    @property
    def active(self) -> bool:
        return self._active

    @cached_property
    def activation_bytes(self) -> int:
        """Activation memory in bytes. Deserializes the plan, and closes it again if that loads the weights."""
        fresh = self._session is None
        size = self._opened().activation_bytes
        if fresh and not self._opened().deferred:
            self.close()
        return size

    def activate(self) -> None:
        """Load the plan. Raises ``EngineMismatchError`` for another GPU or version, or ``MissingDependencyError``."""
        if self._active:
            return
        import torch

        session = self._opened()
        self._workspace.enter(self)
        if session.deferred:
            with torch.cuda.device(self._workspace.device):
                session.load_weights(self._workspace.loading)
                self._loaded = self._workspace.loading.record_event()
        self._active = True

    def _opened(self) -> Session:
        if self._session is None:
            import torch

            if (reason := incompatibility(self.path)) is not None:
                raise EngineMismatchError(f"{self.path}: {reason}")
            with torch.cuda.device(self._workspace.device):
                self._session = Session(self.path, self.info, self._streaming_budget)
        return self._session

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        import torch

        symbols = self.io.check(inputs)
        profile = choose_profile(self.info.profiles, symbols)
        self.activate()
        if elsewhere := [name for name, tensor in inputs.items() if tensor.device.type != "cuda"]:
            raise EngineMismatchError(f"{elsewhere[0]} is on {inputs[elsewhere[0]].device}, the engine on CUDA")
        with torch.cuda.device(self._workspace.device), self._workspace.turn() as stream:
            compiles = shape_key(inputs) not in self._contexts
            context = self._context(inputs, profile)
            if self._loaded is not None:
                stream.wait_event(self._loaded)
            outputs = context.run(inputs, self.io.output_shapes(symbols), stream)
            self._done = stream.record_event()
            if compiles:
                self._opened().keep_kernels()
        return dict(outputs)

    def _context(self, inputs: Tensors, profile: int) -> ShapedContext:
        key = shape_key(inputs)
        if key not in self._contexts:
            while len(self._contexts) >= SHAPES:
                self._contexts.popitem(last=False)
            session = self._opened()
            self._contexts[key] = ShapedContext(
                session.context(),
                self._workspace,
                profile=profile,
                io=self.io,
                bindings=session.bindings,
                capture=self._streaming_budget is None,  # a captured graph does not include copies of streamed weights
            )
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def park(self) -> None:
        if self._session is None or not self._session.deferred:
            self.close()
        elif self._active:
            self._finish()
            for context in self._contexts.values():
                context.forget_graph()
            self._session.unload_weights()
            self._active = False

    def _finish(self) -> None:
        """Wait until the device has finished this engine's work."""
        for event in (self._loaded, self._done):
            if event is not None:
                event.synchronize()

    def close(self) -> None:
        self._finish()
        self._contexts.clear()
        self._loaded = self._done = None
        self._session = None
        self._active = False
        self._workspace.leave(self)
