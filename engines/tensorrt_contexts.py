"""TensorRT contexts on a GPU, the memory that they share, and one captured graph per shape.

TensorRT's rule is one context for each captured graph: a graph fixes the context's shapes and addresses. So
every set of input shapes has its own context, static inputs and graph. All of them share one block of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from dyexport.engines.base import EngineIO, Tensors
from dyexport.errors import EngineMismatchError

if TYPE_CHECKING:
    import torch

ALIGNMENT = 256  # bytes, of the memory of a context


class Member(Protocol):
    """A user of a workspace."""

    @property
    def activation_bytes(self) -> int:
        """Return the device memory needed during a run; may load a plan."""


class Workspace:
    """One block of activation memory and one stream, shared by the engines of a bundle.

    The block is as large as the largest engine needs, and is allocated once, when the first of them is activated: a
    captured graph holds its address. ``turn`` orders a run between the caller's work before and after it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._members: list[Member] = []
        self._users: set[int] = set()
        self._block: torch.Tensor | None = None

    def join(self, member: Member) -> None:
        self._members.append(member)

    def enter(self, member: Member) -> None:
        """Let a member use the block until it leaves. The first to enter allocates it for the largest member."""
        import torch

        self._users.add(id(member))
        if self._block is None:
            largest = max(member.activation_bytes for member in self._members)
            self._block = torch.empty(largest + ALIGNMENT, dtype=torch.uint8, device=self.device)

    def leave(self, member: Member) -> None:
        """Free the block after its last user."""
        self._users.discard(id(member))
        if not self._users:
            self._block = None

    @property
    def memory(self) -> tuple[int, int]:
        """Address and size of the block."""
        assert self._block is not None, "a member enters before it runs"
        start = -self._block.data_ptr() % ALIGNMENT
        return self._block.data_ptr() + start, self._block.numel() - start

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Stream of the runs; on the default stream, TensorRT would synchronize the device at every run."""
        import torch

        return torch.cuda.Stream(self.device)

    @cached_property
    def loading(self) -> torch.cuda.Stream:
        """Stream that copies weights to the device during runs."""
        import torch

        return torch.cuda.Stream(self.device)

    @contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream]:
        import torch

        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield self.stream
        caller.wait_stream(self.stream)


class ShapedContext:
    """A context at one set of shapes. The first run binds the caller's tensors; the second is captured into a graph.

    ``bindings`` are the inputs and outputs that the plan has kept. Without ``capture`` every run is like the first.
    """

    def __init__(
        self,
        context: Any,
        workspace: Workspace,
        *,
        profile: int,
        io: EngineIO,
        bindings: frozenset[str],
        capture: bool,
    ) -> None:
        self._context = context
        self._workspace = workspace
        self._profile = profile
        self._io = io
        self._bindings = bindings
        self._capturing = capture
        self._prepared = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}

    def run(self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]], stream: torch.cuda.Stream) -> Tensors:
        """Enqueue on ``stream``, which is current. The caller owns the outputs."""
        if not self._prepared:
            return self._first(inputs, shapes, stream)
        if self._graph is None and self._capturable(stream):
            self._graph = self._capture(inputs, shapes, stream)
        if self._graph is None:
            return self._enqueue(inputs, shapes, stream)
        for name, static in self._inputs.items():
            static.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}

    def forget_graph(self) -> None:
        """Drop the graph, because weights that are loaded again may have other addresses."""
        self._graph = None
        self._inputs, self._outputs = {}, {}

    def _first(self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]], stream: torch.cuda.Stream) -> Tensors:
        if not self._context.set_optimization_profile_async(self._profile, stream.cuda_stream):
            raise EngineMismatchError(
                f"TensorRT has no profile {self._profile} in this plan; run dyexport compile again"
            )
        for name in self._bindings & inputs.keys():
            self._context.set_input_shape(name, tuple(inputs[name].shape))
        self._context.set_device_memory(*self._workspace.memory)
        self._prepared = True
        return self._enqueue(inputs, shapes, stream)

    def _enqueue(self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]], stream: torch.cuda.Stream) -> Tensors:
        outputs = self._allocate(shapes)
        held = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        self._bind({**held, **outputs})
        self._execute(stream)
        return outputs

    def _capturable(self, stream: torch.cuda.Stream) -> bool:
        ask = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX knows
        return self._capturing and (ask is None or ask(stream.cuda_stream))

    def _capture(
        self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]], stream: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        """Capture one run as a graph, from inputs to outputs at fixed addresses."""
        import torch

        self._inputs = {name: tensor.detach().contiguous().clone() for name, tensor in inputs.items()}
        self._outputs = self._allocate(shapes)
        self._bind({**self._inputs, **self._outputs})
        self._execute(stream)  # TensorRT requires an uncaptured run at new addresses first
        graph = torch.cuda.CUDAGraph()
        # Another thread may be loading the weights of the next engine, which is not part of the graph.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._execute(stream)
        return graph

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        import torch

        return {
            spec.name: torch.empty(shapes[spec.name], dtype=getattr(torch, spec.dtype), device=self._workspace.device)
            for spec in self._io.outputs
        }

    def _bind(self, tensors: Tensors) -> None:
        for name in self._bindings & tensors.keys():
            self._context.set_tensor_address(name, tensors[name].data_ptr())

    def _execute(self, stream: torch.cuda.Stream) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineMismatchError("TensorRT cannot run this plan on these inputs; its log says why")
