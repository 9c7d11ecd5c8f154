"""Torch-TensorRT programs on an NVIDIA GPU. Untested on a GPU: no machine of this project has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.engines.base import Tensors
from dyexport.engines.plan_engine import PlanEngine
from dyexport.engines.tensorrt_fit import choose_profile, incompatibility
from dyexport.errors import EngineBuildError, EngineMismatchError
from dyexport.tensorrt_api import load_api

if TYPE_CHECKING:
    import torch


class TorchTensorRtEngine(PlanEngine):
    """Engine over one program, whose description is next to it.

    Loading the file runs code from it, so its bundle is always opened with hashes checked.
    """

    def __init__(self, path: Path, *, device: str = "cuda") -> None:
        self.path = path
        self.device = device
        self._module: Any = None

    @property
    def active(self) -> bool:
        return self._module is not None

    def activate(self) -> None:
        """Load the program. Raises ``EngineMismatchError`` for one of another GPU or version."""
        if self._module is not None:
            return
        import torch

        if (reason := incompatibility(self.path)) is not None:
            raise EngineMismatchError(f"{self.path}: {reason}")
        try:
            with torch.cuda.device(self.device):
                self._module = load_api(self.info.flavour).trt.load(str(self.path)).module()
        except Exception as error:  # raised by many libraries
            raise EngineBuildError(f"Torch-TensorRT cannot load {self.path}: {error}") from error

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        import torch

        choose_profile(self.info.profiles, self.io.check(inputs))  # other sizes would run slowly in torch
        self.activate()
        with torch.no_grad(), torch.cuda.device(self.device):
            outputs = self._module(*(inputs[spec.name] for spec in self.io.inputs))
        values = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return {spec.name: value for spec, value in zip(self.io.outputs, values, strict=True)}

    def close(self) -> None:
        self._module = None
