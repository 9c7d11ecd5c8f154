"""ONNX graphs on TensorRT-RTX, through ONNX Runtime's plug-in provider. Untested on a GPU.

The provider compiles a graph for the GPU it runs on, which takes seconds to minutes. The result, and the kernels that
are compiled when it runs, are kept in the user's cache folder. A bundle needs no plans for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from dyexport.bundle.graph_forms import AttentionForm
from dyexport.bundle.onnx_schema import Message
from dyexport.engines.base import WeightSpan
from dyexport.engines.ort import OrtEngine, load_onnxruntime
from dyexport.errors import EngineMismatchError, MissingDependencyError, StorageError, reason
from dyexport.files import replacing, user_cache

CONTEXT = "context.onnx"
KERNELS = "kernels"  # folder next to a compiled graph
RUNTIME_CACHE = "nv_runtime_cache_path"


class OrtRtxEngine(OrtEngine):
    """Engine over one ONNX graph on TensorRT-RTX.

    ``streaming_budget`` bounds the bytes of weights that stay on the device. Attention is ``primitive`` by default:
    where TensorRT-RTX has no fused kernel, such as in fp32, it does not decompose the operator of another form.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cuda",
        streaming_budget: int | None = None,
        attention: AttentionForm | None = None,
    ) -> None:
        super().__init__(path, device=device, attention=attention or "primitive")
        self._streaming_budget = streaming_budget

    def _start(self, ort: Any, model: Message) -> Any:
        index = int(self.device.partition(":")[2] or 0)
        device = rtx_devices()[index]
        settings = provider_settings(self._streaming_budget)
        graph = model.SerializeToString()
        compiled = compiled_graphs() / context_key(
            graph, self.weights, {**settings, **versions(ort), **_metadata(device)}
        )
        if not compiled.is_dir():
            self._compile(ort, graph, device, settings, compiled)
        options = self._options(ort)
        options.add_provider_for_devices([device], {**settings, **kernel_settings(compiled)})
        return ort.InferenceSession(str(compiled / CONTEXT), options)

    def _compile(self, ort: Any, graph: bytes, device: Any, settings: dict[str, str], out: Path) -> None:
        """Write the compiled graph into the folder ``out``."""
        with filling(out) as folder:
            options = self._options(ort)
            for key, value in context_entries(folder / CONTEXT).items():
                options.add_session_config_entry(key, value)
            options.add_provider_for_devices([device], settings)
            ort.InferenceSession(graph, options)


def compiled_graphs() -> Path:
    return user_cache() / "tensorrt-rtx"


class _FasterError(Exception):
    """Signal that another process has compiled the same graph."""


@contextmanager
def filling(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; it becomes ``out`` on success, unless another process was faster."""
    try:
        with suppress(_FasterError), replacing(out) as partial:
            partial.mkdir(mode=0o700)  # a compiled graph is code: no other user may write here
            yield partial
            if out.is_dir():
                raise _FasterError
    except StorageError as error:
        raise StorageError(f"cannot keep a compiled graph in {out.parent}: {error}") from error


def provider_settings(streaming_budget: int | None) -> dict[str, str]:
    """Return options of the provider, without CUDA graphs, which would fix the addresses of one run."""
    return {} if streaming_budget is None else {"nv_weight_streaming_budget": f"{streaming_budget}B"}


def kernel_settings(compiled: Path) -> dict[str, str]:
    """Return options that keep the kernels of a compiled graph next to it; none where the folder cannot be written."""
    try:
        (compiled / KERNELS).mkdir(exist_ok=True)
    except OSError:
        return {}
    return {RUNTIME_CACHE: str(compiled / KERNELS)}


def context_entries(path: Path) -> dict[str, str]:
    """Return session settings that write the compiled graph to ``path``, its engine in a file next to it."""
    return {"ep.context_enable": "1", "ep.context_file_path": str(path), "ep.context_embed_mode": "0"}


def context_key(graph: bytes, weights: tuple[WeightSpan, ...], circumstances: dict[str, str]) -> str:
    """Return a name that changes with everything a compiled graph was made from.

    Weight files are identified by path, size and time of modification.
    """
    digest = hashlib.sha256(graph)
    for path in sorted({span.path.resolve() for span in weights}):
        facts = path.stat()
        digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    for name, value in sorted(circumstances.items()):
        digest.update(f"{name}={value}\n".encode())
    return digest.hexdigest()[:32]


def versions(ort: Any) -> dict[str, str]:
    import onnxruntime_ep_nv_tensorrt_rtx as provider

    return {"onnxruntime": str(ort.__version__), "provider": str(provider.__version__)}


def _metadata(device: Any) -> dict[str, str]:
    return {f"device.{name}": str(value) for name, value in device.device.metadata.items()}


def incompatibility() -> str | None:
    """Explain why the provider cannot run here and what to do; None if it can."""
    try:
        rtx_devices()
    except (EngineMismatchError, MissingDependencyError) as error:
        return str(error)
    return None


def rtx_devices() -> list[Any]:
    """Return the provider's GPUs. Raises ``EngineMismatchError`` without one, ``MissingDependencyError`` without it."""
    name = _registered()
    devices = [device for device in load_onnxruntime().get_ep_devices() if device.ep_name == name]
    if not devices:
        raise EngineMismatchError(
            "ONNX Runtime's TensorRT-RTX provider finds no GPU that it runs on (GeForce RTX 30 or later); "
            "use --target onnx"
        )
    return devices


@cache
def _registered() -> str:
    """Register the provider's library with ONNX Runtime, once; return its name."""
    ort = load_onnxruntime()
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as provider
    except ImportError as error:
        raise MissingDependencyError("ONNX Runtime's TensorRT-RTX provider", "rtx") from error
    name = str(provider.get_ep_name())
    try:
        ort.register_execution_provider_library(name, provider.get_library_path())
    except Exception as error:  # loading the library may raise anything
        raise EngineMismatchError(
            f"ONNX Runtime cannot load its TensorRT-RTX provider ({_cause(error)}); "
            "install NVIDIA's driver, or use --target onnx"
        ) from error
    return name


def _cause(error: Exception) -> str:
    """Return the last part of a vendor's chain of reasons."""
    return reason(error).rpartition("with error: ")[2]
