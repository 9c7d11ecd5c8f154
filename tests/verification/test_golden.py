"""A copied bundle is verified with nothing but itself, and what is wrong with it is still seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.bundle.golden import GOLDEN, GoldenData
from dyexport.bundle.manifest_file import WIDTHS
from dyexport.bundle.plan import Segment, segment_name
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.errors import BundleError, EngineMismatchError, UsageError
from dyexport.pipeline.golden import golden_preset
from dyexport.presets import get_preset
from dyexport.slicing.recipes import Recipe
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.manifests import forge, relabel
from tests.pipeline.tiny import tamper
from tests.test_runtime_only import BUILD, without
from tests.verification.test_verify import overwrite

BACKBONES = ("dit_tiny", "sit_tiny", "latte_tiny", "flux_tiny", "qwen_image_tiny")
OLD = Path(__file__).parents[1] / "bundle" / "schema-3"
SETTINGS = VerifySettings()


def copied(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a bundle without its work directory."""
    shutil.copytree(bundle.root, folder / "copy")
    return Bundle.open(folder / "copy")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_copied_bundle_equals_its_golden_data(backbone: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle = copied(request.getfixturevalue(backbone), tmp_path)
    report = verify_bundle(bundle.root, SETTINGS)
    assert report.passed
    assert report.reference is None
    assert report.no_reference is not None
    assert report.no_reference == "the model that the bundle was cut from is not on this machine"
    assert report.golden is not None
    assert report.timesteps == report.golden.timesteps == 4
    assert report.error is not None
    assert 0 < report.error <= 1e-5
    assert all(segment.compared > 0 for segment in report.segments)
    assert report.golden.dense_compared == ("dense" in bundle.engine_paths("onnx"))


def test_the_dense_network_is_compared(sit_tiny: Bundle, tmp_path: Path) -> None:
    report = verify_bundle(copied(sit_tiny, tmp_path).root, SETTINGS)
    assert report.golden is not None
    assert report.golden.dense_error is not None
    assert report.golden.dense_error <= 1e-5

    def spoil(golden: GoldenData) -> None:
        golden.samples[0].dense[0] += 1e-3  # type: ignore[index]

    edit(tmp_path / "copy", spoil)
    report = verify_bundle(tmp_path / "copy", SETTINGS)
    assert report.error is not None
    assert report.error <= report.tolerance, "of the dynamic networks"
    assert not report.passed


def edit(root: Path, change: Callable[[GoldenData], None]) -> None:
    """Change golden data, and its hash as a forger would."""
    golden = GoldenData.load(root / GOLDEN)
    change(golden)
    golden.save(root / GOLDEN)
    tamper(root, GOLDEN, lambda content: content)


def test_golden_data_is_what_the_masked_model_computes(sit_tiny: Bundle) -> None:
    model, _ = load_dynamic(find_reference(sit_tiny))
    for sample in GoldenData.load(sit_tiny.root / GOLDEN).samples:
        with torch.no_grad():
            output = model({name: torch.from_numpy(array) for name, array in sample.inputs.items()})
        assert np.abs(output.sample.numpy() - sample.sample).max() <= 1e-6
        assert np.array_equal(output.tokens.sum(-1).numpy(), sample.kept_tokens)
        assert np.array_equal(output.heads[0].numpy() > 0.5, sample.heads)
        assert np.array_equal(output.groups[0].numpy() > 0.5, sample.groups)


@pytest.mark.parametrize("bundle", ["compact"], indirect=True)
@pytest.mark.parametrize("network", ["segment-00", "segment-03"])
def test_one_flipped_weight_fails(bundle: Bundle, network: str, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    assert verify_bundle(copy.root, SETTINGS).passed

    def flip(recipe: Recipe, weight: np.ndarray) -> None:
        weight.flat[np.abs(weight).argmax()] *= -1

    overwrite(copy, network, "blocks.1.out.weight", flip)
    report = verify_bundle(copy.root, SETTINGS)
    assert not report.passed
    segment = next(part for part in report.segments if segment_name(part.segment) == network)
    assert segment.error is not None
    assert segment.error > report.tolerance


def test_one_wrong_gate_fails(sit_tiny: Bundle, tmp_path: Path) -> None:
    copy = copied(sit_tiny, tmp_path)
    sample = GoldenData.load(copy.root / GOLDEN).samples[0]
    masks = copy.widths.heads[copy.widths.row(sample.timestep)]
    block = int(masks.sum(axis=1).argmax())
    masks[block, np.flatnonzero(masks[block])[-1]] = False
    copy.widths.save(copy.root / WIDTHS)
    tamper(copy.root, WIDTHS, lambda content: content)
    report = verify_bundle(copy.root, SETTINGS)
    assert report.wrong_gates >= 1
    assert not report.passed


@pytest.mark.parametrize("bundle", ["capacity", "dynamic"], indirect=True)
def test_golden_inputs_fit_into_token_capacities(bundle: Bundle, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    report = verify_bundle(copy.root, SETTINGS)
    assert report.passed
    assert report.overflow == 0

    def shrink(manifest: dict[str, Any]) -> None:
        for segment in manifest["plan"]["segments"]:
            segment["capacities"] = [0] * len(segment["capacities"])
            segment["slot_buckets"] = segment["slot_buckets"][:1]

    forge(copy.root, shrink)
    relabel(copy.root)
    report = verify_bundle(copy.root, VerifySettings())
    assert report.overflow == report.timesteps
    assert not report.passed, "nothing was compared"


@pytest.mark.parametrize("other", ["flux_tiny", "latte_tiny"])
def test_golden_data_of_another_bundle_is_refused(
    sit_tiny: Bundle, other: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    copy, foreign = copied(sit_tiny, tmp_path), request.getfixturevalue(other)
    tamper(copy.root, GOLDEN, lambda _: (foreign.root / GOLDEN).read_bytes())
    with pytest.raises(BundleError, match=r"golden\.safetensors is of another bundle; build the bundle again"):
        verify_bundle(copy.root, SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:100], "cannot read"),
        (lambda content: content.replace(b"0/kept_tokens", b"0/kept_tokenz"), "lacks 'kept_tokens'"),
        (lambda content: content.replace(b"identity", b"identitz"), "identity: Field required"),
    ],
)
def test_damaged_golden_data_is_named(
    sit_tiny: Bundle, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    copy = copied(sit_tiny, tmp_path)
    tamper(copy.root, GOLDEN, change)
    with pytest.raises(BundleError, match=message):
        verify_bundle(copy.root, SETTINGS)


@pytest.mark.parametrize("where", ["copy", "built"])
def test_nothing_that_builds_is_needed(sit_tiny: Bundle, where: str, tmp_path: Path) -> None:
    """Where the reference is in place but cannot be run, golden data takes its place."""
    root = copied(sit_tiny, tmp_path).root if where == "copy" else sit_tiny.root
    done = without((*BUILD, "sklearn"), "verify", str(root), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"]
    assert report["reference"] is None
    assert report["golden"]["timesteps"] == report["timesteps"] == 4
    gone = "the model that the bundle was cut from is not on this machine"
    assert report["no_reference"].endswith(gone if where == "copy" else " is not installed")
    assert report["expected_reference"] == str(root.parent / "work" / "calibrated")


def test_options_of_the_reference_are_not_ignored(sit_tiny: Bundle, tmp_path: Path) -> None:
    root = copied(sit_tiny, tmp_path).root
    message = (
        r"--\w+ needs the reference, and the model .* is not on this machine; leave it out .*, or give --reference DIR"
    )
    for settings in (VerifySettings(timesteps=2), VerifySettings(seed=0), VerifySettings(layers=True)):
        with pytest.raises(UsageError, match=message):
            verify_bundle(root, settings)
    report = verify_bundle(root, VerifySettings(timesteps=2, layers=True), reference=find_reference(sit_tiny))
    assert report.passed
    assert report.layers is not None


def test_a_bundle_without_golden_data_needs_its_reference() -> None:
    message = "is not on this machine, and .* has no golden data, .*; give --reference DIR, .*, or build again"
    with pytest.raises(BundleError, match=message):
        verify_bundle(OLD, SETTINGS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_named_before_the_bundle_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device is 'cuda' and torch sees 0 CUDA devices"):
        verify_bundle(tmp_path, VerifySettings(device="cuda"))


def test_a_target_that_the_bundle_lacks_is_named(sit_tiny: Bundle) -> None:
    with pytest.raises(EngineMismatchError, match="has no 'tensorrt' engines; it was built for onnx"):
        verify_bundle(sit_tiny.root, VerifySettings(target="tensorrt"))


def test_golden_inputs_are_small_but_not_below_a_capacity(flux_tiny: Bundle) -> None:
    flux, segments = get_preset("flux"), flux_tiny.manifest.plan.segments

    def with_capacity(tokens: int) -> list[Segment]:
        depth = segments[0].depth
        limited = {"token_paths": ("capacity",) * depth, "capacities": (tokens,) * depth}
        return [segment.model_copy(update=limited) for segment in segments]

    assert golden_preset(flux, segments) == flux.for_noise()
    assert golden_preset(flux, with_capacity(2400)).tokens == 49**2
    assert golden_preset(get_preset("qwen-image"), with_capacity(2400)) == get_preset("qwen-image")
