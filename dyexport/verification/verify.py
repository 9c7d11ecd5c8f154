"""Comparison of a bundle with the masked torch model that it was cut from.

In fp32, both must be equal at every timestep, but for rounding. In half precision every activation is rounded, and a
token near its threshold may fall either way; the error is then that of whole outputs, relative to them: root mean
square over root mean square.

A quantized bundle is compared with the masked model, fake-quantized as the engines are. For a value between two codes
the last digit of fp32 decides, and the difference is rounded in all later layers. The error is therefore the distance
to that model relative to the error of quantization: near 0 in a shallow network, up to 0.9 in one of twelve blocks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.checkpoints.streaming import must_stream
from dyexport.errors import BundleError, missing_extras
from dyexport.models.dynamic import DynamicTransformer
from dyexport.presets import preset_of
from dyexport.progress import Progress, no_progress
from dyexport.runtime.loading import load
from dyexport.runtime.routing import route
from dyexport.runtime.transformer import BundleTransformer
from dyexport.stages.file_records import describe, digest_of
from dyexport.verification.layers import compare_layers
from dyexport.verification.reference_model import ReferenceModel, near_threshold
from dyexport.verification.report import Comparison, VerifyReport, summarize
from dyexport.verification.settings import VerifySettings, reference_of


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

    Raises ``BundleError`` without the reference that the bundle was cut from, and ``UsageError`` for
    layers of a quantized bundle and for a model without a smaller size.
    """
    bundle = Bundle.open(path)
    settings.check_for(bundle)
    reference = find_reference(bundle) if reference is None else reference_of(bundle, reference)
    parameters = preset_of(bundle.manifest.model).parameters
    model, preset = load_dynamic(reference, stream=must_stream(parameters))
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
    gates, wrong_gates = check_gates(bundle, model)
    report = summarize(
        bundle.manifest,
        settings.target,
        settings.tolerance,
        comparisons,
        redrawn=reference_model.redrawn,
        gates=gates,
        wrong_gates=wrong_gates,
    )
    if not settings.layers:
        return report
    return replace(report, layers=compare_layers(bundle, reference, reference_model, report.tolerance))


def find_reference(bundle: Bundle, work: Path | None = None) -> Path:
    """Return the dynamic checkpoint that a bundle was built from, in ``work`` or else where the manifest says.

    Raises ``BundleError`` if it is not there or has changed.
    """
    path, reference = reference_of(bundle, work=work), bundle.manifest.reference
    assert reference is not None
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
    timesteps = [float(np.float32(random.uniform(*span))) for span in spans]
    return [min(t, float(np.nextafter(np.float32(whole[1]), np.float32(0)))) for t in timesteps]


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
