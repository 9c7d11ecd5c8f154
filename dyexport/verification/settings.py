"""Settings of a verification, checked when they are made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dyexport.arguments import check_seed, whole_number
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.structure import DYNAMIC
from dyexport.errors import BundleError, UsageError
from dyexport.presets import preset_of

MOST_TIMESTEPS = 100_000
MOST_TOLERANCE = 100.0


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Settings of a comparison.

    ``tolerance`` defaults to that of the bundle's precision. With ``layers``, graphs are compared with torch module by
    module too. With ``small``, samples are as small as for calibration on noise. Raises ``UsageError`` for values out
    of range.
    """

    timesteps: int = 64
    tolerance: float | None = None
    target: str = "onnx"
    seed: int = 0
    layers: bool = False
    small: bool = False

    def __post_init__(self) -> None:
        whole_number("--timesteps", self.timesteps, least=1, most=MOST_TIMESTEPS)
        check_seed(self.seed, "--seed")
        if self.tolerance is not None and not 0 < self.tolerance <= MOST_TOLERANCE:
            raise UsageError(f"--tolerance is {self.tolerance}; give a number above 0, up to {MOST_TOLERANCE:g}")

    def check_for(self, bundle: Bundle) -> None:
        """Raise ``UsageError`` for settings that do nothing with a bundle, as far as its manifest tells."""
        spec = bundle.manifest.model
        if self.layers and spec.quantization:
            raise UsageError(
                f"--layers compares layers in floating point, and {bundle.root} is in {spec.quantization}; leave it out"
            )
        preset = preset_of(spec)
        if self.small and preset.for_noise() == preset:
            raise UsageError(f"--small does nothing here: {preset.name} is compared at its own size; leave it out")


def reference_of(bundle: Bundle, given: Path | None = None, *, work: Path | None = None) -> Path:
    """Return the dynamic checkpoint that a bundle is compared with: ``given``, or the one that it was built from.

    The latter lies in ``work``, or else where the manifest says. Raises ``BundleError`` if there is none.
    """
    cure = "give --reference with a dynamic checkpoint, such as WORK/calibrated of its build"
    if given is not None:
        if not (given / DYNAMIC).is_file():
            problem = "is no dynamic checkpoint" if given.exists() else "does not exist"
            raise BundleError(f"--reference {given} {problem}; {cure}, or leave it out")
        return given
    reference = bundle.manifest.reference
    if reference is None:
        raise BundleError(f"{bundle.root} names no reference; {cure}")
    path = bundle.root / reference.path if work is None else work / Path(reference.path).name
    if not path.is_dir():
        raise BundleError(f"the reference {path} is gone; {cure}, or build again")
    return path
