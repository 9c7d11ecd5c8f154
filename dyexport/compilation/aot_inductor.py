"""Compiler of AOTInductor packages, from the slim torch modules of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyexport.bundle.package_info import PACKAGE_INFO, PackageInfo, machine_of
from dyexport.compilation.base import EngineJob
from dyexport.compilation.modules import slim_module
from dyexport.errors import EngineMismatchError
from dyexport.exporters.torch_package import build_package, check_compiler, typical_sizes
from dyexport.progress import Progress


@dataclass(frozen=True, kw_only=True)
class TorchCompiler:
    """Compiler of packages for a ``device`` of this machine: ``cpu``, ``cuda`` or ``cuda:N``."""

    target: str = "torch"
    device: str = "cpu"

    @classmethod
    def on(cls, device: str | None) -> TorchCompiler:
        """Return the compiler for a device; None chooses CUDA where torch has it."""
        return cls(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def parallel(self) -> bool:
        return True

    def version(self) -> str:
        check_compiler(self.device)
        return str(torch.__version__)

    def inputs(self, job: EngineJob) -> Mapping[str, Any]:
        return {"machine": machine_of(self.device).model_dump(mode="json")}

    def is_current(self, job: EngineJob, engine: Path) -> bool:
        try:
            info = PackageInfo.read(engine.with_name(PACKAGE_INFO))
        except EngineMismatchError:
            return False
        made = (info.version, info.machine, info.graph_sha256)
        return made == (torch.__version__, machine_of(self.device), job.graph_sha256)

    def other_options(self, job: EngineJob, engine: Path) -> tuple[str, ...]:
        return ()

    def compile(self, job: EngineJob, out: Path, progress: Progress) -> None:
        """Write the package into the new directory ``out``. Raises ``EngineBuildError``."""
        module = slim_module(job.networks, job.network, job.graph)
        build_package(
            module.slice,
            out,
            sizes=typical_sizes(job.networks.spec, job.segment, module.slice),
            precision=job.networks.spec.precision,
            graph_sha256=job.graph_sha256,
            device=self.device,
        )
