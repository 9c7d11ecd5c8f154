"""Settings of a verification, checked when they are made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dyexport.arguments import check_seed, whole_number
from dyexport.errors import UsageError

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
