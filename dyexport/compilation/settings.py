"""Settings of one compilation, checked when they are made. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dyexport.arguments import shown, whole_number
from dyexport.bundle.targets import ONNX, TARGETS, Option
from dyexport.errors import UsageError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings, check_profiles

if TYPE_CHECKING:
    from dyexport.bundle.manifest import Manifest

MOST_JOBS = 1024


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """Settings of ``dyexport compile``. ``jobs`` engines are compiled at a time; None: as many as memory allows.

    ``device`` is ``cpu``, ``cuda`` or ``cuda:N``; None chooses CUDA where there is a GPU. Raises ``UsageError`` for
    unknown targets and for options that none of the targets has.
    """

    targets: tuple[str, ...]
    tensorrt: TensorrtSettings = field(default_factory=TensorrtSettings)
    device: str | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        for target in self.targets or ("",):
            _check_target(target)
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,4})?", self.device):
            raise UsageError(f"unknown device {shown(self.device)!r}; use cpu, cuda or cuda:N")
        if self.jobs is not None:
            whole_number("--jobs", self.jobs, least=1, most=MOST_JOBS)
        for option, name in self._given():
            if not any(option in TARGETS[target].options for target in self.targets):
                raise UsageError(f"{name} does nothing for {' and '.join(self.targets)}; leave it out")

    def check_for(self, manifests: Sequence[Manifest]) -> None:
        """Raise ``UsageError`` for a profile with a dimension that no network has at any budget of a bundle."""
        segments = [segment for manifest in manifests for segment in manifest.plan.segments]
        check_profiles(manifests[0].model, segments, self.tensorrt)

    def _given(self) -> list[tuple[Option, str]]:
        """Return the options that are not at their defaults, and how they are written."""
        options: list[tuple[object, Option, str]] = [
            (self.tensorrt.profiles, "profile", "--profile"),
            (self.tensorrt.compute_capabilities, "compute_capability", "--compute-capability"),
            (self.tensorrt.stream_weights, "stream_weights", "--stream-weights"),
            (self.device, "device", "--device"),
            (self.jobs, "jobs", "--jobs"),
        ]
        return [(option, name) for value, option, name in options if value]


def _check_target(target: str) -> None:
    known = [name for name in TARGETS if name != ONNX]
    if target == ONNX:
        raise UsageError(
            f"the ONNX graphs of a bundle are its own, and nothing compiles them; give --target {' or '.join(known)}"
        )
    if target not in TARGETS:
        raise UsageError(f"unknown target {shown(target)!r}; known: {', '.join(known)}")
