"""A deserialized TensorRT plan, which makes contexts; on TensorRT-RTX its weights can be unloaded.

TensorRT-RTX can deserialize a plan without its weights, load them on a stream and unload them again; contexts
stay valid. (Its weights manager does the same for plans built without weights, which takes a GPU to build.) It
does not do so for plans whose weights can be streamed. Classic TensorRT loads a plan whole.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.bundle.plan_info import PlanInfo
from dyexport.engines.tensorrt_kernels import KernelCache, kernel_file
from dyexport.tensorrt_api import BuildLog, load_api

if TYPE_CHECKING:
    import torch

CHUNK = 64 * 2**20  # bytes of a plan that are in host memory at a time while its weights are loaded


class Session:
    """One plan on the device that is current. ``streaming_budget`` bounds the bytes of weights that stay there."""

    def __init__(self, path: Path, info: PlanInfo, streaming_budget: int | None = None) -> None:
        self._path = path
        self._trt = load_api(info.flavour).trt
        self._log = BuildLog(self._trt)
        self._runtime = self._trt.Runtime(self._log.logger)
        self.deferred = not info.streamable and hasattr(self._runtime, "defer_weights_loading")
        self._engine = self._deserialize()
        if info.streamable and streaming_budget is not None:
            self._engine.weight_streaming_budget_v2 = min(streaming_budget, self._engine.streamable_weights_size)
        self._config = runtime_config(self._trt, self._engine)
        self._kernels = None if self._config is None else self._kernel_cache(info)
        self._reader: Any = None

    def _kernel_cache(self, info: PlanInfo) -> KernelCache:
        """Make the cache that contexts of this engine share, with the kernels of earlier processes."""
        import torch

        gpu = torch.cuda.get_device_name()
        cache = self._config.create_runtime_cache()
        kept = KernelCache(cache, kernel_file(info.plan_sha256, str(self._trt.__version__), gpu))
        self._config.set_runtime_cache(cache)
        return kept

    def keep_kernels(self) -> None:
        """Store the kernels that were compiled so far, for the next process."""
        if self._kernels is not None:
            self._kernels.save()

    def _deserialize(self) -> Any:
        if self.deferred:
            self._runtime.defer_weights_loading = True
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._log.failure(f"TensorRT cannot load {self._path}")
        return engine

    @property
    def bindings(self) -> frozenset[str]:
        """Inputs and outputs; TensorRT drops an input that nothing reads."""
        return frozenset(self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors))

    @property
    def activation_bytes(self) -> int:
        """Device memory that a context needs while it runs, whatever the profile."""
        return int(self._engine.device_memory_size_v2)

    def load_weights(self, stream: torch.cuda.Stream) -> None:
        """Begin to copy deferred weights; work that is enqueued on ``stream`` later can use them."""
        self._reader = stream_reader(
            self._trt, PlanFile(self._path)
        )  # kept alive: TensorRT reads from it asynchronously
        if not self._engine.load_weights_async(self._reader, stream.cuda_stream):
            raise self._log.failure(f"TensorRT cannot load the weights of {self._path}")

    def unload_weights(self) -> None:
        """Free deferred weights. Nothing may be running that reads them."""
        self._reader = None
        if not self._engine.unload_weights():
            raise self._log.failure(f"TensorRT cannot unload the weights of {self._path}")

    def context(self) -> Any:
        """Make a context without memory for activations."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None:
            raise self._log.failure(f"TensorRT cannot run {self._path}")
        return context


def runtime_config(trt: Any, engine: Any) -> Any:
    """Return how TensorRT-RTX compiles kernels of a context; None on classic TensorRT, which compiles none."""
    specialization = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if specialization is None:
        return None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # Kernels compiled in the background would come too late for a captured graph, which keeps the fallback.
    config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
    return config


class PlanFile:
    """A file reader as TensorRT expects: reads in chunks, and offsets from the end are positive."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, CHUNK))

    def seek(self, offset: int, where: str) -> bool:
        """Move to an offset; ``where`` is TensorRT's ``SET``, ``CUR`` or ``END``."""
        self._file.seek(-offset if where == "END" else offset, ("SET", "CUR", "END").index(where))
        return True


def stream_reader(trt: Any, plan: PlanFile) -> Any:
    """Make TensorRT's reader of a plan; needs NVIDIA's driver."""

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            return plan.read(num_bytes)

        def seek(self, offset: int, where: Any) -> bool:
            return plan.seek(offset, where.name)

    return Reader()
