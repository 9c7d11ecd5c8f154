"""Comparison of a bundle with the masked torch model that it was cut from.

In fp32, both must be equal at every timestep, but for rounding. In half precision every activation is rounded, and a
token near its threshold may fall either way; the error is then that of whole outputs, relative to them: root mean
square over root mean square.

A quantized bundle is compared with the masked model, fake-quantized as the engines are. For a value between two codes
the last digit of fp32 decides, and the difference is rounded in all later layers. The error is therefore the distance
to that model relative to the error of quantization: near 0 in a shallow network, up to 0.9 in one of twelve blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyexport.arguments import check_seed, whole_number
from dyexport.bundle.manifest import Manifest, ModelSpec, Precision, Quantization
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.checkpoints.streaming import must_stream
from dyexport.errors import BundleError, UsageError, missing_extras
from dyexport.models.dynamic import DynamicTransformer
from dyexport.pipeline.file_records import describe, digest_of
from dyexport.presets import preset_of
from dyexport.progress import Progress, no_progress
from dyexport.runtime.loading import load
from dyexport.runtime.routing import route
from dyexport.runtime.transformer import BundleTransformer
from dyexport.verification.layers import LayerReport, compare_layers
from dyexport.verification.reference_model import ReferenceModel, near_threshold

TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}  # largest absolute; then relative
QUANTIZED = 2.0  # distance to the fake-quantized model over what quantization costs; 1.4 if the two were unrelated

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

    Inputs at ``timesteps`` were compared; ``overflow`` of them kept more tokens than a capacity holds and are left out
    of the error. ``redrawn`` more had a token so near its threshold that fp32 does not decide. ``tolerance`` is of
    ``max_abs_error`` in fp32, of ``relative_error`` in half precision, and of ``quantization_ratio`` in eight bits,
    where the other two are the error of quantization. All ``gates`` of the width table were compared with the routers;
    ``wrong_gates`` differ.
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
        """The error that is compared with ``tolerance``."""
        if self.quantization is not None:
            return self.quantization_ratio
        return self.max_abs_error if self.precision == "fp32" else self.relative_error

    @property
    def passed(self) -> bool:
        error = self.error
        drifts = self.layers is not None and self.layers.first_drift is not None
        return error is not None and error <= self.tolerance and self.wrong_gates == 0 and not drifts

    def __repr__(self) -> str:
        error = "no finite error" if self.error is None else f"error {self.error:.1e}"
        result = "passed" if self.passed else "failed"
        return f"VerifyReport({result}: {error} of at most {self.tolerance:g} at {self.timesteps} timesteps)"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error, "passed": self.passed}


class Comparison(NamedTuple):
    """Errors at one timestep; None if tokens overflowed."""

    segment: int
    error: float | None = None
    relative: float | None = None
    quantization_ratio: float | None = None


@missing_extras()
def verify(
    bundle: Bundle | str | Path,
    *,
    target: str = "onnx",
    timesteps: int = 64,
    tolerance: float | None = None,
    layers: bool = False,
    small: bool = False,
    seed: int = 0,
    reference: str | Path | None = None,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Compare a bundle with the masked torch model that it was cut from, at random timesteps.

    ``target`` is the engine format to run. ``tolerance`` bounds the absolute error in fp32 (default 1e-4), the relative
    one in fp16 (1e-2) and bf16 (8e-2), and in int8 and fp8 the error relative to that of quantization (2). With
    ``layers``, every layer of the ONNX graphs is compared too; with ``small``, samples are small, which takes seconds
    instead of minutes for large models. ``reference`` is a dynamic checkpoint, by default the one in the bundle's work
    directory. ``progress(done, total)`` counts timesteps.

    >>> dyexport.verify("sit-digits-0.5", timesteps=4)
    VerifyReport(passed: error ... of at most 0.0001 at 4 timesteps)

    Raises ``BundleError`` without the reference that the bundle was cut from, and ``UsageError`` for values out of
    range.
    """
    settings = VerifySettings(
        timesteps=timesteps, tolerance=tolerance, target=target, seed=seed, layers=layers, small=small
    )
    root = bundle.root if isinstance(bundle, Bundle) else Path(bundle)
    return verify_bundle(root, settings, reference=None if reference is None else Path(reference), progress=progress)


def verify_bundle(
    path: Path,
    settings: VerifySettings,
    *,
    reference: Path | None = None,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Compare a bundle with its reference, by default the one that it was built from.

    Raises ``BundleError`` where there is no reference, or not the one the bundle was cut from, and ``UsageError`` for
    layers of a quantized bundle and for a model without a smaller size.
    """
    bundle = Bundle.open(path)
    if settings.layers and (kind := bundle.manifest.model.quantization):
        raise UsageError(f"--layers compares layers in floating point, and {path} is in {kind}; leave it out")
    preset = preset_of(bundle.manifest.model)
    if settings.small and preset.for_noise() == preset:
        raise UsageError(f"--small does nothing here: {preset.name} is compared at its own size; leave it out")
    reference = reference or find_reference(bundle)
    model, preset = load_dynamic(reference, stream=must_stream(preset.parameters))
    sized = preset.for_noise() if settings.small else preset
    reference_model = ReferenceModel(model, sized, bundle, settings.seed)
    comparisons: list[Comparison] = []
    transformer = load(path, target=settings.target, device="cpu", check_hashes=False, fallback=False)
    try:
        for t in sample_timesteps(bundle.manifest, settings):
            comparisons.append(_compare(bundle, reference_model, transformer, t))
            progress(len(comparisons), settings.timesteps)
    finally:
        transformer.close()
    report = _report(bundle.manifest, settings, comparisons, reference_model.redrawn, *check_gates(bundle, model))
    if not settings.layers:
        return report
    return replace(report, layers=compare_layers(bundle, reference, reference_model, report.tolerance))


def find_reference(bundle: Bundle, work: Path | None = None) -> Path:
    """Return the dynamic checkpoint that a bundle was built from, in ``work`` or else where the manifest says.

    Raises ``BundleError`` if it is not there or has changed.
    """
    reference = bundle.manifest.reference
    if reference is None:
        raise BundleError(
            f"{bundle.root} names no reference; pass --reference with the dynamic checkpoint it was cut from"
        )
    path = bundle.root / reference.path if work is None else work / Path(reference.path).name
    if not path.is_dir():
        raise BundleError(f"the reference {path} is gone; pass --reference with the dynamic checkpoint, or build again")
    if digest_of({name: record.sha256 for name, record in describe(path).items()}) != reference.sha256:
        change = "has changed since the bundle was built; build again"
        raise BundleError(f"the reference {path} {change if work is None else f'is not the one of {bundle.root}'}")
    return path


def sample_timesteps(manifest: Manifest, settings: VerifySettings) -> list[float]:
    """Return timesteps of fp32, uniform over the range; if there are enough, at least one in each segment."""
    random = np.random.default_rng(settings.seed)
    spans = [(segment.start, segment.end) for segment in manifest.plan.segments]
    whole = manifest.model.timestep_range
    spans = spans if len(spans) <= settings.timesteps else []
    spans += [whole] * (settings.timesteps - len(spans))
    drawn = [float(np.float32(random.uniform(*span))) for span in spans]
    return [min(t, float(np.nextafter(np.float32(whole[1]), np.float32(0)))) for t in drawn]


def _compare(bundle: Bundle, reference_model: ReferenceModel, transformer: BundleTransformer, t: float) -> Comparison:
    inputs, expected = reference_model.at(t)
    quantized = reference_model.quantized(t, inputs)
    chosen = route(bundle.manifest.plan, bundle.widths, bundle.token_stats, t)
    kept = (quantized or expected).tokens.sum(dim=-1)  # (B, L)
    if any((kept[:, block] > limit).any() for block, limit in enumerate(chosen.token_limits)):
        return Comparison(chosen.segment)
    with torch.no_grad():
        sample = transformer(**inputs).sample  # (B, C_out, H, W)
    difference = sample - expected.sample
    ratio = None if quantized is None else _ratio(sample - quantized.sample, quantized.sample - expected.sample)
    return Comparison(chosen.segment, float(difference.abs().max()), _ratio(difference, expected.sample), ratio)


def _ratio(values: Tensor, others: Tensor) -> float:
    """Return the ratio of root mean squares."""
    return float(values.square().mean().sqrt() / others.square().mean().sqrt())


@torch.no_grad()
def check_gates(bundle: Bundle, model: DynamicTransformer) -> tuple[int, int]:
    """Compare every gate of the width table with the model's, in the middle of its row.

    Returns the number of gates, and how many differ.
    """
    table = bundle.widths
    middles = (table.grid + np.append(table.grid[1:], table.end)) / 2
    timesteps = torch.from_numpy(middles.astype(np.float32))  # (T,)
    heads, groups = model.width_gates(timesteps)  # (T, L, H), (T, L, G)
    doubtful = [torch.zeros_like(gates, dtype=torch.bool) for gates in (heads, groups)]
    if model.table is None:
        doubtful = [near_threshold(logits) for logits in model.width_logits(timesteps)]
    wrong = sum(
        int(((torch.from_numpy(stored) != (computed > 0.5)) & ~either).sum())
        for stored, computed, either in zip((table.heads, table.groups), (heads, groups), doubtful, strict=True)
    )
    return heads.numel() + groups.numel(), wrong


def _report(
    manifest: Manifest, settings: VerifySettings, comparisons: list[Comparison], redrawn: int, gates: int, wrong: int
) -> VerifyReport:
    segments = tuple(_per_segment(manifest, comparisons))
    overflow = sum(segment.overflow for segment in segments)
    return VerifyReport(
        target=settings.target,
        timesteps=len(comparisons),
        overflow=overflow,
        overflow_share=overflow / len(comparisons),
        redrawn=redrawn,
        gates=gates,
        wrong_gates=wrong,
        precision=manifest.model.precision,
        quantization=manifest.model.quantization,
        tolerance=settings.tolerance or _tolerance(manifest.model),
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
