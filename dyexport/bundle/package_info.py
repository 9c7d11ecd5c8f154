"""Description of a package of compiled torch code that can be read without loading it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dyexport.bundle.tensors import TensorSpec
from dyexport.errors import EngineMismatchError

PACKAGE = "model.pt2"
PACKAGE_INFO = "model.json"  # next to a package


class Machine(BaseModel):
    """Requirements of compiled code on a machine.

    ``device`` is ``cpu`` or ``cuda``. ``capability`` is torch's CPU capability with its architecture
    (``x86_64 AVX512``), or a compute capability (``8.9``). ``features`` are the instruction sets of the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cpu", "cuda"]
    capability: str
    features: tuple[str, ...] = ()


class PackageInfo(BaseModel):
    """Contents of ``model.json``, next to a package. ``version`` is that of torch.

    The package takes ``weights``, then ``inputs``. ``limits`` and ``floors`` bound symbols in the shapes of ``inputs``
    from above and below. ``graph_sha256`` is of the network's ONNX graph, which says where in the weight store each
    weight is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    machine: Machine
    precision: str
    weights: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: dict[str, int]
    floors: dict[str, int]
    graph_sha256: str
    package_sha256: str

    @classmethod
    def read(cls, path: Path) -> PackageInfo:
        """Read a description. Raises ``EngineMismatchError`` for a file that is not one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise EngineMismatchError(f"cannot read {path}: {error}; make it again with `dyexport compile`") from error

    def write(self, folder: Path) -> None:
        (folder / PACKAGE_INFO).write_text(self.model_dump_json(indent=1), encoding="utf-8")


def machine_of(device: str) -> Machine:
    """Describe this machine for ``cpu``, ``cuda`` or ``cuda:N``."""
    import torch

    if device.startswith("cuda"):
        return Machine(device="cuda", capability="{}.{}".format(*torch.cuda.get_device_capability(device)))
    features = (name for name, value in torch.cpu.get_capabilities().items() if value is True)
    capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Machine(device="cpu", capability=capability, features=tuple(sorted(features)))
