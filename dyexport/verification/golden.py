"""Comparison of a bundle with its golden data, which needs neither the reference nor what makes bundles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dyexport.bundle.golden import GOLDEN, GoldenData, GoldenSample, reference_identity
from dyexport.bundle.manifest import DENSE
from dyexport.bundle.reader import Bundle
from dyexport.errors import BundleError
from dyexport.runtime.transformer import BundleTransformer
from dyexport.verification.comparison import Comparison, Errors, Expected, compare, measure


def read_golden(bundle: Bundle) -> GoldenData | None:
    """Read the golden data of a bundle; None for a bundle of an earlier version, which has none.

    Raises ``BundleError`` for data of another bundle.
    """
    manifest = bundle.manifest
    if manifest.place(GOLDEN) not in manifest.files:
        return None
    path = bundle.path(GOLDEN)
    golden = GoldenData.load(path)
    reference = None if manifest.reference is None else manifest.reference.sha256
    if golden.info.identity != reference_identity(reference, manifest.model, manifest.plan.segments):
        raise BundleError(f"{path} is of another bundle; build the bundle again")
    _check_shapes(bundle, golden)
    return golden


def _check_shapes(bundle: Bundle, golden: GoldenData) -> None:
    """Raise ``BundleError`` for gates and counts of another model."""
    table = bundle.widths
    for sample in golden.samples:
        shapes = sample.heads.shape, sample.groups.shape, sample.kept_tokens.shape[1:]
        if shapes != (table.heads.shape[1:], table.groups.shape[1:], table.heads.shape[1:2]):
            raise BundleError(f"{bundle.path(GOLDEN)} is of another model; build the bundle again")


def compare_golden(bundle: Bundle, golden: GoldenData, transformer: BundleTransformer) -> Iterator[Comparison]:
    """Compare the output at every golden timestep."""
    for sample in golden.samples:
        expected = Expected(
            torch.from_numpy(sample.sample),
            sample.kept_tokens,
            None if sample.quantized is None else torch.from_numpy(sample.quantized),
        )
        yield compare(bundle, transformer, sample.timestep, _inputs(sample), expected)


@torch.no_grad()
def compare_dense(golden: GoldenData, dense: BundleTransformer) -> Iterator[Errors]:
    """Compare the dense network where golden data has outputs of the static model."""
    for sample in golden.samples:
        if sample.dense is not None:
            quantized = None if sample.quantized_dense is None else torch.from_numpy(sample.quantized_dense)
            yield measure(dense(**_inputs(sample)).sample, torch.from_numpy(sample.dense), quantized)


def has_dense(bundle: Bundle, golden: GoldenData, files: str) -> bool:
    """Return whether the dense network of a target can be compared; ``files`` are the target's."""
    built = any(engine.target == files and engine.network == DENSE for engine in bundle.manifest.engines)
    return built and any(sample.dense is not None for sample in golden.samples)


def check_golden_gates(bundle: Bundle, golden: GoldenData) -> tuple[int, int]:
    """Compare the width table with the reference's gates at golden timesteps.

    Returns the number of gates, and how many differ.
    """
    table, total, wrong = bundle.widths, 0, 0
    for sample in golden.samples:
        row = table.row(sample.timestep)
        for stored, computed in ((table.heads[row], sample.heads), (table.groups[row], sample.groups)):
            total += computed.size
            wrong += int((stored != computed).sum())
    return total, wrong


def _inputs(sample: GoldenSample) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in sample.inputs.items()}
