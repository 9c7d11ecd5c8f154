"""``verify`` passes what is right, and fails on a single wrong gate, unit or token."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.bundle.manifest import CONDITIONING
from dyexport.bundle.manifest_file import WIDTHS
from dyexport.bundle.plan import segment_name
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.errors import UsageError
from dyexport.exporters.onnx_graph import STORE
from dyexport.pipeline.networks import cut_networks
from dyexport.pipeline.reference_model import near_threshold
from dyexport.slicing.recipes import Recipe
from dyexport.slicing.slicer import SliceContext
from dyexport.slicing.store_layout import lay_out
from dyexport.verification.reference import bundle_reference, sample_timesteps
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.manifests import forge, relabel
from tests.pipeline.tiny import tamper

SETTINGS = VerifySettings(timesteps=64)
FEW = VerifySettings(timesteps=8)  # enough to see an error that is there at every t
WEIGHTS = f"graphs/{STORE}"


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle to tamper with, next to the reference."""
    shutil.copytree(bundle.root.parent, tmp_path / "copy")
    return Bundle.open(tmp_path / "copy" / bundle.root.name)


def test_a_bundle_equals_the_masked_model(bundle: Bundle) -> None:
    report = verify_bundle(bundle.root, SETTINGS)
    assert report.passed
    assert report.golden is not None
    assert report.timesteps == 64 + report.golden.timesteps
    assert report.max_abs_error is not None
    assert report.max_abs_error <= 1e-5
    assert sum(segment.compared + segment.overflow for segment in report.segments) == report.timesteps
    assert all(segment.compared + segment.overflow > 0 for segment in report.segments)
    assert report.wrong_gates == 0
    assert report.gates == bundle.widths.heads.size + bundle.widths.groups.size


def flip_gate(bundle: Bundle) -> bool:
    """Switch a unit off in the longest row where one is on that is gated; returns whether any unit is gated.

    Without gated units the engines do not read the table, which is wrong all the same.
    """
    table, plan = bundle.widths, bundle.manifest.plan
    for row in np.argsort(-table.measure(), kind="stable"):
        segment = plan.segments[plan.segment_for(float(table.grid[row]))]
        for masks, gated in ((table.heads, segment.gated_heads), (table.groups, segment.gated_groups)):
            for block in np.flatnonzero(gated):
                if masks[row, block, 1:].any():
                    return _switch_off(bundle, masks[row, block])
    return not _switch_off(bundle, table.heads[0, 0])


def _switch_off(bundle: Bundle, gates: np.ndarray) -> bool:
    """The last unit that is on, but never unit 0."""
    gates[np.flatnonzero(gates)[-1]] = False
    bundle.widths.save(bundle.root / WIDTHS)
    tamper(bundle.root, WIDTHS, lambda content: content)
    return True


def overwrite(bundle: Bundle, network: str, weight: str, change: Callable[[Recipe, np.ndarray], None]) -> None:
    """Change one weight of one network where it lies in the store; ``change`` edits it in place."""
    manifest = bundle.manifest
    context = SliceContext.of(manifest.model, bundle.widths, bundle.token_stats)
    networks = cut_networks(context, bundle.widths, manifest.plan.segments, baseline=False, own_dense="nothing")
    recipes = {each.name: each.slice.recipes for each in networks}
    layout = lay_out(recipe for each in recipes.values() for recipe in each.values())
    recipe = recipes[network][weight]

    def edit(content: bytes) -> bytes:
        store = np.frombuffer(bytearray(content), np.uint8)
        start = layout.offsets[recipe]
        change(recipe, store[start : start + recipe.nbytes].view(np.float32).reshape(recipe.shape))
        return store.tobytes()

    tamper(bundle.root, WEIGHTS, edit)


def drop_unit(recipe: Recipe, weight: np.ndarray) -> None:
    """The last kept unit of a weight stored by units: with its columns zero it contributes nothing."""
    weight[-recipe.unit_size :] = 0


def test_one_flipped_gate_fails(copy: Bundle) -> None:
    gated = flip_gate(copy)
    report = verify_bundle(copy.root, SETTINGS)
    assert report.wrong_gates == 1
    assert not report.passed
    assert report.max_abs_error is not None
    assert not gated or report.max_abs_error > report.tolerance


@pytest.mark.parametrize("weight", ["out.weight", "fc2.weight"])
def test_one_dropped_unit_fails(copy: Bundle, weight: str) -> None:
    overwrite(copy, segment_name(0), f"blocks.1.{weight}", drop_unit)
    report = verify_bundle(copy.root, FEW)
    assert not report.passed
    assert report.segments[0].max_abs_error is not None
    assert report.segments[0].max_abs_error > report.tolerance


@pytest.mark.parametrize("bundle", ["compact"], indirect=True)  # conditioning knows nothing of token paths
@pytest.mark.parametrize("weight", ["frequencies", "labels.weight", "blocks.1.weight", "final.bias"])
def test_one_wrong_condition_fails(copy: Bundle, weight: str) -> None:
    """The first row moved by a tenth of the largest: a frequency off by less hardly tells for t in [0, 1]."""

    def shift(recipe: Recipe, values: np.ndarray) -> None:
        values[0] += 0.1 * np.abs(values).max()

    overwrite(copy, CONDITIONING, weight, shift)
    report = verify_bundle(copy.root, FEW)
    assert report.max_abs_error is not None
    assert report.max_abs_error > report.tolerance
    assert not report.passed


def test_one_token_decision_fails(copy: Bundle) -> None:
    """Move the router's bias just so far that the token nearest its threshold changes sides."""
    model, preset = load_dynamic(find_reference(copy))
    t = sample_timesteps(copy, SETTINGS)[0]
    _, output = bundle_reference(model, preset, copy).at(t)
    logits = output.token_logits[:, 0].flatten()  # (B * N,)
    nearest = float(logits[logits.abs().argmin()])

    def shift(recipe: Recipe, bias: np.ndarray) -> None:
        bias -= 1.01 * nearest

    overwrite(copy, segment_name(copy.manifest.plan.segment_for(t)), "blocks.0.router_out.bias", shift)
    report = verify_bundle(copy.root, SETTINGS)
    assert not report.passed
    assert report.max_abs_error is not None
    assert report.max_abs_error > report.tolerance


def test_outputs_that_are_not_numbers_fail(copy: Bundle) -> None:
    def spoil(recipe: Recipe, weight: np.ndarray) -> None:
        weight.flat[0] = np.nan

    overwrite(copy, segment_name(0), "blocks.0.fc1.weight", spoil)
    report = verify_bundle(copy.root, FEW)
    assert report.max_abs_error is None
    assert not report.passed


@pytest.mark.parametrize("bundle", ["capacity", "dynamic"], indirect=True)
def test_what_overflows_is_counted_and_left_out(copy: Bundle) -> None:
    """Say of every capacity that it is smaller than it is: what fits in less is compared, and still equal."""
    model, preset = load_dynamic(find_reference(copy))
    truth = bundle_reference(model, preset, copy)
    kept = [truth.at(t)[1].tokens.sum(-1).max() for t in sample_timesteps(copy, SETTINGS)]

    def shrink(manifest: dict[str, Any]) -> None:
        for segment in manifest["plan"]["segments"]:
            slots = segment["slot_buckets"][-1:] or [0]
            segment["capacities"] = [int(min(kept)) - slots[0]] * len(segment["capacities"])

    forge(copy.root, shrink)
    relabel(copy.root)
    report = verify_bundle(copy.root, SETTINGS)
    assert 0 < report.overflow < report.timesteps
    assert report.overflow_share == report.overflow / report.timesteps
    assert report.passed


def test_a_reference_that_changed_is_not_compared(copy: Bundle) -> None:
    """The golden data still tells; a checkpoint that is passed is taken as it is."""
    reference = find_reference(copy)
    (reference / "metrics.json").write_text("{}")
    report = verify_bundle(copy.root, VerifySettings())
    assert report.passed
    assert report.reference is None
    assert report.no_reference == f"the reference {reference} has changed since the bundle was built"
    with pytest.raises(UsageError, match=r"--timesteps needs the reference, and the reference .* has changed"):
        verify_bundle(copy.root, SETTINGS)
    report = verify_bundle(copy.root, replace(SETTINGS, timesteps=4), reference=reference)
    assert report.passed
    assert report.reference == str(reference)


def test_undecided_logits() -> None:
    logits = torch.tensor([[1.0, -1.0, 1e-6, torch.inf], [2.0, -2.0, 1e-3, torch.inf]])
    assert near_threshold(logits).tolist() == [[False, False, True, False], [False, False, False, False]]


def test_timesteps_are_random_and_reach_every_segment(bundle: Bundle) -> None:
    drawn = sample_timesteps(bundle, SETTINGS)
    assert len(set(drawn)) == 64
    plan = bundle.manifest.plan
    assert {plan.segment_for(t) for t in drawn} == set(range(len(plan.segments)))
    assert drawn != sample_timesteps(bundle, replace(SETTINGS, seed=1))
    assert len(sample_timesteps(bundle, replace(SETTINGS, timesteps=1))) == 1


def test_bad_settings() -> None:
    with pytest.raises(UsageError, match="--timesteps is 0"):
        VerifySettings(timesteps=0)
    with pytest.raises(UsageError, match="--tolerance is nan"):
        VerifySettings(tolerance=float("nan"))
