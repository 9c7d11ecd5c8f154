"""Which targets run on this machine, on which device, and what the others lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import get_args

from dyexport.bundle.plan_info import Flavour
from dyexport.doctor.machine import Accelerators, Host
from dyexport.doctor.probing import explain
from dyexport.engines.registry import BACKENDS
from dyexport.errors import MissingDependencyError
from dyexport.tensorrt_api import load_api

CUDA = "CUDAExecutionProvider"
FIRST_JETPACK_7 = 38  # release of Jetson Linux
RTX_PROVIDER = "onnxruntime_ep_nv_tensorrt_rtx"  # module of ONNX Runtime's plug-in
FOR_TENSORRT = {"tensorrt": ("tensorrt", "TensorRT"), "torch-tensorrt": ("torch_tensorrt", "Torch-TensorRT")}


@dataclass(frozen=True, kw_only=True)
class Machine:
    host: Host
    accelerators: Accelerators


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something that is missing, and the command that installs it; None where no command does."""

    what: str
    install: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Fitness of a machine for the engines of a target. ``device`` is ``cpu`` or ``cuda``, None if they run on neither.

    With ``compiles``, engines of the target can be compiled here, for this machine or another. A target that runs may
    have needs too: of a faster device, or of compiling.
    """

    target: str
    device: str | None
    compiles: bool = False
    needs: tuple[Need, ...] = ()


def judge_all(machine: Machine) -> tuple[Verdict, ...]:
    """Judge every target that the registry of engines knows."""
    return tuple(judge(target, machine) for target in BACKENDS)


def judge(target: str, machine: Machine) -> Verdict:
    """Judge one target. What a broken library raises becomes a need."""
    try:
        import_module("torch")  # the engines of every target exchange its tensors
        return CHECKS[target](target, machine)
    except MissingDependencyError as error:
        return Verdict(target=target, device=None, needs=(_absent(error),))
    except Exception as error:  # whatever a half-installed library raises
        return Verdict(target=target, device=None, needs=(Need(what=explain(error)),))


def _absent(error: MissingDependencyError) -> Need:
    """Tell a library that is absent from one that is there and cannot be loaded."""
    cause = error.__cause__
    if not isinstance(cause, Exception) or isinstance(cause, ModuleNotFoundError | StopIteration):
        return Need(what=error.library, install=error.install)
    return Need(what=f"a working {error.library}: {explain(cause)}", install=f"{error.install} --force-reinstall")


def _onnx(target: str, machine: Machine) -> Verdict:
    if machine.accelerators.providers is None:
        from dyexport.engines.ort import load_onnxruntime

        load_onnxruntime()  # raises the reason
    packages = machine.host.packages
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        extra = "gpu" if machine.accelerators.gpus else "cpu"
        remedy = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'dyexport[{extra}]'"
        twice = Need(what="one ONNX Runtime: onnxruntime and onnxruntime-gpu overwrite each other", install=remedy)
        return Verdict(target=target, device="cpu", needs=(twice,))
    if not machine.accelerators.gpus:
        return Verdict(target=target, device="cpu")
    if CUDA in (machine.accelerators.providers or ()):
        return Verdict(target=target, device="cuda")
    remedy = "pip uninstall -y onnxruntime && pip install 'dyexport[gpu]'"
    return Verdict(target=target, device="cpu", needs=(Need(what="ONNX Runtime with CUDA", install=remedy),))


def _onnx_rtx(target: str, machine: Machine) -> Verdict:
    if needs := [*_gpu_needs(machine)]:
        if find_spec(RTX_PROVIDER) is None and machine.host.jetson is None:
            needs.append(_absent(MissingDependencyError("ONNX Runtime's TensorRT-RTX provider", "rtx")))
        return Verdict(target=target, device=None, needs=tuple(needs))
    from dyexport.engines.ort_rtx import rtx_devices

    rtx_devices()
    return Verdict(target=target, device="cuda")


def _torch(target: str, machine: Machine) -> Verdict:
    needs = [*_kernel_needs(machine.accelerators)]
    if machine.host.compiler is None:
        needs.append(Need(what="g++, for `dyexport compile` only", install="sudo apt-get install g++"))
    device = "cuda" if machine.accelerators.gpus else "cpu"
    return Verdict(target=target, device=device, compiles=machine.host.compiler is not None, needs=tuple(needs))


def _rtx_plans(target: str, machine: Machine) -> Verdict:
    """Judge plans that are compiled without a GPU, too; none are for a Jetson."""
    needs = [*_gpu_needs(machine)]
    if needs and machine.host.jetson is not None:
        return Verdict(target=target, device=None, needs=tuple(needs))
    try:
        api = load_api("tensorrt-rtx")
    except MissingDependencyError as error:
        return Verdict(target=target, device=None, needs=(*needs, _absent(error)))
    if not needs:
        api.capability(machine.accelerators.gpus[0].compute_capability)
    return Verdict(target=target, device=None if needs else "cuda", compiles=True, needs=tuple(needs))


def _gpu_plans(flavour: Flavour, target: str, machine: Machine) -> Verdict:
    module, library = FOR_TENSORRT[flavour]
    needs = [*_gpu_needs(machine)]
    if find_spec(module) is None:
        needs.append(_tensorrt(library, flavour, machine.host))
    if not needs:
        load_api(flavour)
    return Verdict(target=target, device=None if needs else "cuda", compiles=not needs, needs=tuple(needs))


def _tensorrt(library: str, flavour: Flavour, host: Host) -> Need:
    """Return the need of a TensorRT package. On a Jetson, JetPack has it, and a virtual environment must let it in."""
    if host.jetson is None or flavour != "tensorrt":
        return Need(what=library, install=f"pip install 'dyexport[{flavour}]'")
    if host.jetson.major < FIRST_JETPACK_7:
        return Need(what="JetPack 7, whose TensorRT is for Python 3.12 (JetPack 6 has Python 3.10, too old here)")
    remedy = "sudo apt-get install nvidia-jetpack && python3 -m venv --system-site-packages .venv"
    return Need(what=library, install=remedy)


def _kernel_needs(accelerators: Accelerators) -> Iterator[Need]:
    """Yield a need of kernels for the GPU. Those of an older one with the same first number may run on it."""
    kernels = accelerators.kernels
    for capability in {gpu.compute_capability for gpu in accelerators.gpus} if kernels else ():
        if capability not in kernels:
            yield Need(what=f"torch with kernels for {capability}; this one has them for {', '.join(kernels)}")


def _gpu_needs(machine: Machine) -> Iterator[Need]:
    """Yield what keeps torch from a GPU."""
    host, accelerators = machine.host, machine.accelerators
    if accelerators.gpus:
        return
    if not _has_gpu(host):
        yield Need(what="an NVIDIA GPU")
    elif host.jetson is not None and host.jetson.major < FIRST_JETPACK_7:
        yield Need(
            what=f"JetPack 7.2: torch for CUDA {accelerators.cuda or '13'} sees no GPU under JetPack 6 and earlier"
        )
    elif host.driver is None:
        yield Need(what="NVIDIA's driver", install=None if host.jetson else "sudo ubuntu-drivers install")
    elif accelerators.cuda is None:
        version = (host.packages["torch"] or "").partition("+")[0]
        yield Need(what="torch with CUDA", install=f"pip install --force-reinstall --no-deps torch=={version}")
    else:
        yield Need(what=f"a GPU that torch for CUDA {accelerators.cuda} sees; the driver is {host.driver}")


def _has_gpu(host: Host) -> bool:
    return host.nvidia_hardware or host.jetson is not None or host.driver is not None


CHECKS: dict[str, Callable[[str, Machine], Verdict]] = {
    "onnx": _onnx,
    "onnx-rtx": _onnx_rtx,
    "torch": _torch,
    "tensorrt-rtx": _rtx_plans,
    **{flavour: partial(_gpu_plans, flavour) for flavour in get_args(Flavour) if flavour in FOR_TENSORRT},
}
