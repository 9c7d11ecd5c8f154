"""ONNX Runtime on the CPU or on CUDA. The weights are read from the file next to the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dyexport.bundle.graph_forms import AttentionForm, fuse_attention
from dyexport.bundle.onnx_schema import BFLOAT16, DTYPES, Message
from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.engines.onnx_file import graph_io, graph_weights, read_graph, resolve_weights
from dyexport.errors import DyexportError, EngineBuildError, EngineMismatchError, MissingDependencyError, reason

if TYPE_CHECKING:
    import torch

Providers = list[str | tuple[str, dict[str, Any]]]
ELEMENT_TYPES = {name: number for number, name in DTYPES.items()}
# ONNX Runtime's CUDA provider has flash attention for ``Attention`` since 1.25. Before 1.27, its kernel for attention
# with a mask could read misaligned memory where the number of tokens is no multiple of 8.
FUSES_ON_CUDA = (1, 27)
# The CPU kernel of this fusion takes several times as long as the sum and the norm that it replaces.
SLOWER_ON_CPU = ["SkipLayerNormFusion"]


class OrtEngine(Engine):
    """Engine over one ONNX graph in ONNX Runtime, on as many threads as torch has.

    ``share_weights`` leaves the weights in the mapped file: engines over one file hold them once, and share one
    arena of activations. Without it, ONNX Runtime copies the weights into the layout that its kernels prefer.
    ``attention`` is the form of attention to run; by default, the one that suits the device.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        share_weights: bool = False,
        attention: AttentionForm | None = None,
    ) -> None:
        self.path = path
        self.device = device
        self._device_type = device.partition(":")[0]
        self._share_weights = share_weights
        self._attention = attention
        self._session: Any = None
        self._folder = path.parent  # names of weight files are relative to it

    @cached_property
    def io(self) -> EngineIO:
        return graph_io(read_graph(self.path), self.path)

    @cached_property
    def weights(self) -> tuple[WeightSpan, ...]:
        return graph_weights(read_graph(self.path), self.path)

    @property
    def shares_weights(self) -> bool:
        return self._share_weights and self._device_type == "cpu"

    @property
    def active(self) -> bool:
        return self._session is not None

    def activate(self) -> None:
        if self._session is not None:
            return
        ort = load_onnxruntime()
        model = read_graph(self.path)
        graph_weights(model, self.path)  # rejects weights outside the bundle before they are read
        if self._device_type == "cpu":
            _check_kernels(model, self.path)
        self._folder = resolve_weights(model, self.path)
        if (self._attention or suitable_attention(model, self._device_type, ort.__version__)) == "fused":
            fuse_attention(model)
        with vendor_errors(EngineBuildError, f"ONNX Runtime cannot load {self.path}"):
            self._session = self._start(ort, model)

    def _start(self, ort: Any, model: Message) -> Any:
        """Start a session on this engine's execution provider."""
        return self._session_on(ort, model, {})

    def _session_on(self, ort: Any, model: Message, more: Mapping[str, Any]) -> Any:
        """Start a session with ``more`` options of the CUDA provider."""
        providers = providers_for(self.device, ort.get_available_providers(), {**self._provider_options(), **more})
        options = self._options(ort)
        # With its own fallback, ONNX Runtime would print an error and run on the CPU.
        session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=providers,
            enable_fallback=0,
            disabled_optimizers=SLOWER_ON_CPU if self._device_type == "cpu" else None,
        )
        check_provider(session, self.device)
        return session

    def _provider_options(self) -> dict[str, Any]:
        """Return options of the CUDA provider."""
        return {}

    def _options(self, ort: Any) -> Any:
        import torch

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.x64quantprecision", "1")  # else int8 may saturate without VNNI
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        if self.shares_weights:
            # Prepacking would copy the weights; an arena per session would hold activations once per session.
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.add_session_config_entry("session.use_env_allocators", "1")
            _register_shared_arena()
        return options

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        shapes = self.io.output_shapes(self.io.check(inputs))
        self.activate()
        return self._run({name: tensor.detach().contiguous() for name, tensor in inputs.items()}, shapes)

    def _run(self, inputs: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        outputs = self._allocate(shapes)
        binding = self._bind(inputs, outputs)
        self._synchronize()
        self._execute(binding)
        return outputs

    def _bind(self, inputs: Tensors, outputs: Tensors) -> Any:
        """Bind tensors in place. Raises ``EngineMismatchError`` for one on another device."""
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, **self._location(name, tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, **self._location(name, tensor))
        return binding

    def _execute(self, binding: Any, options: Any = None) -> None:
        with vendor_errors(EngineMismatchError, f"ONNX Runtime cannot run {self.path}"):
            self._session.run_with_iobinding(binding, options)

    def close(self) -> None:
        self._session = None

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        import torch

        return {
            spec.name: torch.empty(shapes[spec.name], dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in self.io.outputs
        }

    def _location(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        """Return the arguments that bind a tensor in place, without a copy."""
        if tensor.device.type != self._device_type:
            raise EngineMismatchError(f"{name} is on {tensor.device}, the engine on {self.device}")
        return {
            "device_type": tensor.device.type,
            "device_id": tensor.device.index or 0,
            "element_type": ELEMENT_TYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "buffer_ptr": tensor.data_ptr(),
        }

    def _synchronize(self) -> None:
        """Wait for torch's stream, because ONNX Runtime runs on another one."""
        if self._device_type == "cuda":
            import torch

            torch.cuda.current_stream(self.device).synchronize()


def has_cuda() -> bool:
    return "CUDAExecutionProvider" in load_onnxruntime().get_available_providers()


def providers_for(
    device: str, available: Sequence[str], options: Mapping[str, Any] = MappingProxyType({})
) -> Providers:
    """Return execution providers for ``cpu``, ``cuda`` or ``cuda:N``, falling back from CUDA to the CPU by operator.

    ``options`` are of the CUDA provider.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind != "cuda":
        raise EngineMismatchError(f"ONNX Runtime engines run on cpu or cuda, not on {device!r}")
    if "CUDAExecutionProvider" not in available:
        raise MissingDependencyError("onnxruntime-gpu", "gpu")
    exact = {"use_tf32": "0"}  # TF32 keeps 10 bits of fp32's 23; half precision is not affected
    return [("CUDAExecutionProvider", {"device_id": int(index or 0), **exact, **options}), "CPUExecutionProvider"]


def check_provider(session: Any, device: str) -> None:
    """Raise ``EngineMismatchError`` for a session without the provider of its device, which ONNX Runtime leaves out."""
    if device.startswith("cuda") and "CUDAExecutionProvider" not in session.get_providers():
        raise EngineMismatchError(
            "ONNX Runtime cannot start its CUDA provider; install the CUDA and cuDNN libraries that it asks for in its "
            "log, or run with device='cpu'"
        )


def suitable_attention(model: Message, device_type: str, version: str) -> AttentionForm:
    """Return the form of attention that suits ``cpu`` or ``cuda`` in a version of ONNX Runtime.

    On CUDA, quantized graphs stay as they are: not every version has kernels for opset 23 of their other operators.
    """
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    known = tuple(int(part) for part in version.split(".")[:2]) >= FUSES_ON_CUDA
    return "fused" if device_type == "cuda" and known and not quantized else "primitive"


def _check_kernels(model: Message, path: Path) -> None:
    """Raise ``EngineMismatchError`` for a graph in bf16; ONNX Runtime's own error names one node only."""
    if any(tensor.data_type == BFLOAT16 for tensor in model.graph.initializer):
        raise EngineMismatchError(
            f"{path} is in bf16, for which ONNX Runtime has no CPU kernels; "
            "run it with device='cuda', or build with --precision fp32 or fp16"
        )


@cache
def load_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "cpu") from error
    return onnxruntime


@cache
def _register_shared_arena() -> None:
    """Register the arena that sessions with ``use_env_allocators`` share.

    It belongs to ONNX Runtime's environment, lives as long as the process, and cannot be unregistered. Sessions of
    other code use it only if they ask for it with the same setting.
    """
    ort = load_onnxruntime()
    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, None)


@cache
def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    values = vars(load_onnxruntime().capi.onnxruntime_pybind11_state).values()
    errors = [value for value in values if isinstance(value, type) and issubclass(value, Exception)]
    return (*errors, RuntimeError, ValueError)


@contextmanager
def vendor_errors(mapped: type[DyexportError], what: str) -> Iterator[None]:
    """Turn everything that ONNX Runtime raises into ``mapped``."""
    try:
        yield
    except _onnxruntime_errors() as error:
        raise mapped(f"{what}: {reason(error)}") from error
