"""Settings of a verification, checked when they are made. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dyexport.arguments import check_device, check_seed, whole_number
from dyexport.bundle.golden import GOLDEN
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.structure import DYNAMIC
from dyexport.errors import BundleError, DyexportError, UsageError
from dyexport.presets import preset_of

TIMESTEPS = 64
MOST_TIMESTEPS = 100_000
MOST_TOLERANCE = 100.0
GIVE_REFERENCE = "give --reference DIR, a dynamic checkpoint such as WORK/calibrated of its build"
GONE = "the model that the bundle was cut from is not on this machine"


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Settings of a comparison.

    ``timesteps`` are those of the comparison with the reference (default 64), and ``seed`` is of their inputs (default
    0). ``tolerance`` defaults to that of the bundle's precision. With ``layers``, graphs are compared with torch module
    by module too. With ``small``, samples are as small as for calibration on noise. ``device`` is that of
    ``dyexport.load``. Raises ``UsageError`` for values out of range.
    """

    timesteps: int | None = None
    tolerance: float | None = None
    target: str = "onnx"
    device: str | None = None
    seed: int | None = None
    layers: bool = False
    small: bool = False

    def __post_init__(self) -> None:
        if self.timesteps is not None:
            whole_number("--timesteps", self.timesteps, least=1, most=MOST_TIMESTEPS)
        if self.seed is not None:
            check_seed(self.seed, "--seed")
        if self.device is not None:
            check_device(self.device)
        if self.tolerance is not None and not 0 < self.tolerance <= MOST_TOLERANCE:
            raise UsageError(f"--tolerance is {self.tolerance}; give a number above 0, up to {MOST_TOLERANCE:g}")

    @property
    def of_reference(self) -> str | None:
        """The first option that only a comparison with the reference reads; None if there is none."""
        given = {
            "--timesteps": self.timesteps is not None,
            "--seed": self.seed is not None,
            "--layers": self.layers,
            "--small": self.small,
        }
        return next((name for name, value in given.items() if value), None)

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


def expected_reference(bundle: Bundle) -> Path | None:
    """Return where the dynamic checkpoint is that a bundle was built from, as its manifest says; it may be gone."""
    reference = bundle.manifest.reference
    return None if reference is None else Path(os.path.normpath(bundle.root / reference.path))


def reference_of(
    bundle: Bundle, given: Path | None = None, *, work: Path | None = None, cure: str = GIVE_REFERENCE
) -> Path:
    """Return the dynamic checkpoint that a bundle is compared with: ``given``, or the one that it was built from.

    The latter lies in ``work``, or else where the manifest says. Raises ``BundleError``, with a ``cure``, if there is
    none.
    """
    if given is not None:
        if not (given / DYNAMIC).is_file():
            problem = "is no dynamic checkpoint" if given.exists() else "does not exist"
            raise BundleError(f"--reference {given} {problem}; {cure}, or leave it out")
        return given
    path = expected_reference(bundle)
    if path is None:
        raise BundleError(f"{bundle.root} names no reference; {cure}")
    if work is not None:
        path = work / path.name
    if not path.is_dir():
        gone = f"the reference {path} is gone" if work is not None else GONE
        raise BundleError(f"{gone}; {cure}, or build again")
    return path


def check_reference(bundle: Bundle, settings: VerifySettings, given: Path | None) -> None:
    """Raise what ``verify`` raises for the reference, as far as file names tell."""
    try:
        reference_of(bundle, given)
    except BundleError as error:
        if given is not None:
            raise
        golden_instead(bundle, settings, error)


def golden_instead(bundle: Bundle, settings: VerifySettings, error: DyexportError) -> str:
    """Return why the reference cannot be opened, if golden data takes its place.

    Raises ``BundleError`` for a bundle without golden data, and ``UsageError`` for options that only a reference reads.
    """
    reason, _, cure = str(error).partition("; ")
    if bundle.manifest.place(GOLDEN) not in bundle.manifest.files:
        raise BundleError(
            f"{reason}, and {bundle.root} has no golden data, since an older dyexport built it; {cure}"
        ) from error
    if (option := settings.of_reference) is not None:
        raise UsageError(
            f"{option} needs the reference, and {reason}; leave it out to compare with the bundle's golden data, "
            f"or {cure}"
        ) from error
    return reason
