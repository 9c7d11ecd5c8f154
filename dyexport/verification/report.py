"""The result of comparing a bundle with its reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dyexport.bundle.golden import InputSource
from dyexport.bundle.manifest import Manifest
from dyexport.bundle.spec import ModelSpec, Precision, Quantization
from dyexport.verification.comparison import Comparison, Errors
from dyexport.verification.settings import VerifySettings

TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}  # fp32: absolute, others: relative
QUANTIZED = 2.0  # error against the fake-quantized model over that of quantization; 1.4 if they are independent


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """The distance of a module's tensors to torch's: largest difference, and root mean square over root mean square.

    Both are None if shapes differ or a value is not finite. ``values`` counts the tensors that were compared.
    """

    network: str
    module: str
    values: int
    max_abs_error: float | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Errors of every module of every network in the order of the graphs; ``tolerance`` is of ``relative_error``.

    ``first_drift`` is the module that produces the first tensor beyond the tolerance; later ones pass its error on.
    ``unmatched`` counts tensors between modules that were not compared, since others have their shape.
    """

    tolerance: float
    layers: tuple[LayerErrors, ...]
    first_drift: LayerErrors | None
    unmatched: int


@dataclass(frozen=True, kw_only=True)
class SegmentErrors:
    """Errors of one segment; None if nothing could be compared, or an output was not finite.

    ``error`` is what the tolerance is of.
    """

    segment: int
    start: float
    end: float
    compared: int
    overflow: int
    error: float | None
    max_abs_error: float | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True)
class WorstErrors:
    """Largest errors of some outputs; None if nothing could be compared, or an output was not finite."""

    max_abs_error: float | None
    relative_error: float | None
    quantization_ratio: float | None

    @classmethod
    def of(cls, errors: Iterable[Errors | None]) -> WorstErrors:
        compared = [error for error in errors if error is not None]
        return cls(
            max_abs_error=_worst(error.absolute for error in compared),
            relative_error=_worst(error.relative for error in compared),
            quantization_ratio=_worst(error.quantization_ratio for error in compared),
        )

    def measured(self, spec: ModelSpec) -> float | None:
        """Return the error that a tolerance is of."""
        if spec.quantization is not None:
            return self.quantization_ratio
        return self.max_abs_error if spec.precision == "fp32" else self.relative_error


@dataclass(frozen=True, kw_only=True)
class GoldenReport:
    """Result of the comparison with the golden data of the bundle; ``error`` is what the tolerance is of.

    ``batch``, ``tokens`` and ``text_tokens`` are the sizes of the inputs. ``gates`` of the width table were compared,
    and ``wrong_gates`` differ. ``dense_error`` is of the dense network; None if the target or the data has none.
    """

    timesteps: int
    source: InputSource
    batch: int
    tokens: int
    text_tokens: int
    error: float | None
    gates: int
    wrong_gates: int
    dense_compared: bool
    dense_error: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class VerifyReport:
    """Result of a comparison.

    reference           dynamic checkpoint that was compared at random timesteps; None: ``golden`` data alone
    no_reference        reason why the reference was not compared
    expected_reference  dynamic checkpoint that the bundle was built from, as it says, there or not
    golden              result of the comparison with the bundle's golden data; None if the bundle has none
    timesteps           number of timesteps whose inputs were compared, those of golden data included
    overflow            inputs that kept more tokens than a capacity holds, which no error includes
    redrawn             inputs that were sampled again, since a token was so near its threshold that rounding decides
    gates               gates of the width table that were compared: all with a reference, else at golden timesteps
    wrong_gates         gates that differ
    max_abs_error       error in fp32
    relative_error      error in half precision
    quantization_ratio  error in eight bits, over the error of quantization; the other two are then that error
    tolerance           largest error that passes
    """

    target: str
    device: str
    reference: str | None
    no_reference: str | None
    expected_reference: str | None
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
    golden: GoldenReport | None = None
    layers: LayerReport | None = None

    @property
    def error(self) -> float | None:
        """Error that is compared with ``tolerance``."""
        if self.quantization is not None:
            return self.quantization_ratio
        return self.max_abs_error if self.precision == "fp32" else self.relative_error

    @property
    def passed(self) -> bool:
        """True if the errors are within the tolerance, all gates agree and no layer drifts."""
        errors = [self.error]
        wrong_gates = self.wrong_gates
        if self.golden is not None:
            wrong_gates += self.golden.wrong_gates
            errors += [self.golden.dense_error] if self.golden.dense_compared else []
        drifts = self.layers is not None and self.layers.first_drift is not None
        return all(error is not None and error <= self.tolerance for error in errors) and not wrong_gates and not drifts

    def __repr__(self) -> str:
        error = "no finite error" if self.error is None else f"error {self.error:.1e}"
        result = "passed" if self.passed else "failed"
        return f"VerifyReport({result}: {error} of at most {self.tolerance:g} at {self.timesteps} timesteps)"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "error": self.error, "passed": self.passed}


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """Comparisons with a reference model, and what else was compared with it."""

    path: str
    comparisons: list[Comparison]
    redrawn: int
    gates: int
    wrong_gates: int


def summarize(
    manifest: Manifest,
    device: str,
    settings: VerifySettings,
    reference: ReferenceResult | None,
    golden: GoldenReport | None,
    golden_comparisons: Sequence[Comparison],
    no_reference: str | None,
    expected_reference: Path | None,
) -> VerifyReport:
    """Make the report of comparisons; the tolerance defaults to that of the bundle's precision."""
    comparisons = [*golden_comparisons, *(reference.comparisons if reference is not None else ())]
    segments = tuple(_per_segment(manifest, comparisons))
    overflow = sum(segment.overflow for segment in segments)
    checked = reference or golden
    assert checked is not None
    return VerifyReport(
        target=settings.target,
        device=device,
        reference=None if reference is None else reference.path,
        no_reference=no_reference,
        expected_reference=None if expected_reference is None else str(expected_reference),
        timesteps=len(comparisons),
        overflow=overflow,
        overflow_share=overflow / len(comparisons),
        redrawn=0 if reference is None else reference.redrawn,
        gates=checked.gates,
        wrong_gates=checked.wrong_gates,
        precision=manifest.model.precision,
        quantization=manifest.model.quantization,
        tolerance=settings.tolerance or _tolerance(manifest.model),
        **asdict(WorstErrors.of(comparison.errors for comparison in comparisons)),
        segments=segments,
        golden=golden,
    )


def _tolerance(spec: ModelSpec) -> float:
    return TOLERANCES[spec.precision] if spec.quantization is None else QUANTIZED


def _per_segment(manifest: Manifest, comparisons: list[Comparison]) -> Iterator[SegmentErrors]:
    for index, segment in enumerate(manifest.plan.segments):
        of_segment = [comparison.errors for comparison in comparisons if comparison.segment == index]
        overflow = sum(errors is None for errors in of_segment)
        worst = WorstErrors.of(of_segment)
        yield SegmentErrors(
            segment=index,
            start=segment.start,
            end=segment.end,
            compared=len(of_segment) - overflow,
            overflow=overflow,
            error=worst.measured(manifest.model),
            max_abs_error=worst.max_abs_error,
            relative_error=worst.relative_error,
        )


def _worst(values: Iterable[float | None]) -> float | None:
    """Return the largest error; None if there is none, or it is not finite."""
    errors = [error for error in values if error is not None]
    return max(errors) if errors and all(math.isfinite(error) for error in errors) else None
