"""The result of comparing a bundle with its reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.spec import ModelSpec, Precision, Quantization
from dyexport.verification.layers import LayerReport

TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}  # fp32: absolute, others: relative
QUANTIZED = 2.0  # error against the fake-quantized model over that of quantization; 1.4 if they are independent


@dataclass(frozen=True, kw_only=True)
class SegmentErrors:
    """Errors of one segment; None if nothing could be compared, or an output was not finite."""

    segment: int
    start: float
    end: float
    compared: int
    overflow: int
    max_abs_error: float | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class VerifyReport:
    """Result of a comparison.

    timesteps           number of timesteps whose inputs were compared
    overflow            inputs that kept more tokens than a capacity holds, which no error includes
    redrawn             inputs that were sampled again, since a token was so near its threshold that rounding decides
    gates               gates of the width table, all compared with the routers
    wrong_gates         gates that differ
    max_abs_error       error in fp32
    relative_error      error in half precision
    quantization_ratio  error in eight bits, over the error of quantization; the other two are then that error
    tolerance           largest error that passes
    """

    target: str
    timesteps: int
    overflow: int
    overflow_share: float
    redrawn: int
    gates: int
    wrong_gates: int
    precision: Precision
    quantization: Quantization | None
    tolerance: float
    max_abs_error: float | None
    relative_error: float | None
    quantization_ratio: float | None
    segments: tuple[SegmentErrors, ...]
    layers: LayerReport | None = None

    @property
    def error(self) -> float | None:
        """Error that is compared with ``tolerance``."""
        if self.quantization is not None:
            return self.quantization_ratio
        return self.max_abs_error if self.precision == "fp32" else self.relative_error

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance, all gates agree and no layer drifts."""
        error = self.error
        drifts = self.layers is not None and self.layers.first_drift is not None
        return error is not None and error <= self.tolerance and self.wrong_gates == 0 and not drifts

    def __repr__(self) -> str:
        error = "no finite error" if self.error is None else f"error {self.error:.1e}"
        result = "passed" if self.passed else "failed"
        return f"VerifyReport({result}: {error} of at most {self.tolerance:g} at {self.timesteps} timesteps)"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "error": self.error, "passed": self.passed}


class Comparison(NamedTuple):
    """Errors at one timestep; None if tokens overflowed."""

    segment: int
    error: float | None = None
    relative: float | None = None
    quantization_ratio: float | None = None


def summarize(
    manifest: Manifest,
    target: str,
    tolerance: float | None,
    comparisons: list[Comparison],
    *,
    redrawn: int,
    gates: int,
    wrong_gates: int,
) -> VerifyReport:
    """Make the report of comparisons; ``tolerance`` defaults to that of the bundle's precision."""
    segments = tuple(_per_segment(manifest, comparisons))
    overflow = sum(segment.overflow for segment in segments)
    return VerifyReport(
        target=target,
        timesteps=len(comparisons),
        overflow=overflow,
        overflow_share=overflow / len(comparisons),
        redrawn=redrawn,
        gates=gates,
        wrong_gates=wrong_gates,
        precision=manifest.model.precision,
        quantization=manifest.model.quantization,
        tolerance=tolerance or _tolerance(manifest.model),
        max_abs_error=_worst(comparison.error for comparison in comparisons),
        relative_error=_worst(comparison.relative for comparison in comparisons),
        quantization_ratio=_worst(comparison.quantization_ratio for comparison in comparisons),
        segments=segments,
    )


def _tolerance(spec: ModelSpec) -> float:
    return TOLERANCES[spec.precision] if spec.quantization is None else QUANTIZED


def _per_segment(manifest: Manifest, comparisons: list[Comparison]) -> Iterator[SegmentErrors]:
    for index, segment in enumerate(manifest.plan.segments):
        of_segment = [comparison for comparison in comparisons if comparison.segment == index]
        overflow = sum(comparison.error is None for comparison in of_segment)
        yield SegmentErrors(
            segment=index,
            start=segment.start,
            end=segment.end,
            compared=len(of_segment) - overflow,
            overflow=overflow,
            max_abs_error=_worst(comparison.error for comparison in of_segment),
            relative_error=_worst(comparison.relative for comparison in of_segment),
        )


def _worst(values: Iterable[float | None]) -> float | None:
    """Return the largest error; None if there is none, or it is not finite."""
    errors = [error for error in values if error is not None]
    return max(errors) if errors and all(math.isfinite(error) for error in errors) else None
