"""ONNX Runtime's CUDA provider on a stream of torch, with captured CUDA graphs. Untested on a GPU.

A captured graph replays one run without launching its kernels one by one. ONNX Runtime captures a run only if all of
its nodes are on the GPU, and its inputs and outputs stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from dyexport.bundle.graph_forms import AttentionForm
from dyexport.bundle.onnx_schema import Message
from dyexport.engines.base import Tensors
from dyexport.engines.ort import OrtEngine, load_onnxruntime, vendor_errors
from dyexport.engines.ort_buffers import BuffersByShape
from dyexport.errors import EngineBuildError, EngineMismatchError

if TYPE_CHECKING:
    import torch

UNCAPTURED = -1  # number of a graph with which ONNX Runtime captures nothing
DATA_DEPENDENT = frozenset({"NonZero", "If", "Loop", "Scan"})  # operators that no graph can be captured with
RECORD_PROVIDERS = "session.record_ep_graph_assignment_info"
ALLOCATING = Lock()
"""Held while a session starts or a graph is captured: device memory that another thread allocates ends a capture."""


class OrtCudaEngine(OrtEngine):
    """Engine over one ONNX graph on ONNX Runtime's CUDA provider.

    Runs are enqueued on one stream, which waits for the caller's stream and is waited for. With ``cuda_graphs``, runs
    of the same shapes are captured, unless the graph or the provider does not allow it. On device ``cpu``, inputs and
    outputs keep their addresses in the same way, and nothing is captured.
    """

    def __init__(
        self, path: Path, *, device: str = "cuda", attention: AttentionForm | None = None, cuda_graphs: bool = False
    ) -> None:
        super().__init__(path, device=device, attention=attention)
        self._cuda_graphs = cuda_graphs
        self._buffers: BuffersByShape | None = None
        self._asynchronous = False

    @property
    def captures(self) -> bool:
        """True while the engine is active and runs may be captured."""
        return self._buffers is not None

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        """Stream of the runs; None on the CPU. A graph cannot be captured on torch's default stream."""
        import torch

        return torch.cuda.Stream(self.device) if self._device_type == "cuda" else None

    def _start(self, ort: Any, model: Message) -> Any:
        with ALLOCATING:
            session = self._capturing_session(ort, model) if self._cuda_graphs and capturable(model) else None
            self._buffers = None if session is None else BuffersByShape(self._bind)
            session = session or super()._start(ort, model)
        self._asynchronous = all_nodes_on(session, "CUDAExecutionProvider")
        return session

    def _capturing_session(self, ort: Any, model: Message) -> Any:
        """Return a session that captures graphs; None if the provider refuses, such as for nodes on the CPU."""
        with suppress(EngineBuildError), vendor_errors(EngineBuildError, f"ONNX Runtime cannot capture {self.path}"):
            return self._session_on(ort, model, {"enable_cuda_graph": "1"})
        return None

    def _provider_options(self) -> dict[str, Any]:
        stream = {} if self._stream is None else {"user_compute_stream": str(self._stream.cuda_stream)}
        return {**super()._provider_options(), **stream}

    def _options(self, ort: Any) -> Any:
        options = super()._options(ort)
        options.add_session_config_entry(RECORD_PROVIDERS, "1")
        return options

    def _run(self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        with self._turn():
            if self._buffers is None:
                return self._run_once(inputs, shapes)
            known = len(self._buffers)
            buffers = self._buffers.find(inputs, lambda: self._allocate(shapes))
            if buffers is None:
                return self._run_once(inputs, shapes)
            if len(self._buffers) == known:
                buffers.fill(inputs)
                self._execute(buffers.binding, self._run_options(buffers.graph))
                return buffers.copies()
            with suppress(EngineMismatchError), ALLOCATING:
                self._execute(buffers.binding, self._run_options(buffers.graph))  # captured in this run
                return buffers.copies()
        return self._run_without_graphs(inputs, shapes)

    def _run_once(self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        outputs = self._allocate(shapes)
        self._execute(self._bind(inputs, outputs), self._run_options(UNCAPTURED))
        return outputs

    def _run_without_graphs(self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Run in a new session on a new stream: those whose capture has failed cannot be relied on."""
        self.__dict__.pop("_stream", None)
        self.close()
        self._cuda_graphs = False
        self.activate()
        return self._run(inputs, shapes)

    def _run_options(self, graph: int) -> Any:
        options = load_onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        if self._asynchronous:  # else memory of the host is in use until the stream has finished
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Run between the caller's work before and after, without waiting for either on the host."""
        import torch

        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def close(self) -> None:
        if self._session is not None and self._stream is not None:
            self._stream.synchronize()
        self._buffers = None
        super().close()


def capturable(model: Message) -> bool:
    """Tell whether no operator of a graph decides on the device what is run, or on what sizes."""
    return not any(node.op_type in DATA_DEPENDENT for node in model.graph.node)


def all_nodes_on(session: Any, provider: str) -> bool:
    """Tell whether a provider runs every node of a session. False before ONNX Runtime 1.24, which records nothing."""
    recorded = getattr(session, "get_provider_graph_assignment_info", None)
    parts = recorded() if recorded is not None else ()
    return bool(parts) and all(part.ep_name == provider for part in parts)
