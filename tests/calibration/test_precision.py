"""Overflow in fp16 is reported by name before anything is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dyexport.bundle.reader import Bundle
from dyexport.calibration.precision import FP16_MAX, headroom, measure_magnitudes
from dyexport.checkpoints.dynamic import save_dynamic
from dyexport.errors import EngineMismatchError, UsageError
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.pipeline.build import opened, price_plans
from dyexport.presets import get_preset
from dyexport.runtime.loading import load
from dyexport.stages.ledger import NullListener
from dyexport.verification.report import TOLERANCES
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import TINY, build, tiny_settings

INPUTS = NoisedInputs(preset=TINY, batch_size=2)
POINTS = (0.2, 0.8)
MLP = "transformer_blocks.1.ff.net.0.proj"


@torch.no_grad()
def overflowing() -> DynamicTransformer:
    """One layer's output is far beyond fp16, and the next one's weights undo it."""
    model = random_dynamic(TINY)
    mlp = model.backbone.transformer_blocks[1].ff
    mlp.net[0].proj.weight.mul_(1e6)
    mlp.net[2].weight.mul_(1e-6)
    return model


def test_the_layer_that_overflows_is_named() -> None:
    magnitudes = measure_magnitudes(overflowing(), INPUTS, POINTS)
    assert [name for name, value in magnitudes.items() if value > FP16_MAX] == [MLP]
    with pytest.raises(UsageError, match=rf"up to 65504 .* in {MLP} \(.*e\+.*\); build with --precision bf16"):
        headroom(magnitudes)


def test_what_is_not_a_number_overflows_too() -> None:
    with pytest.raises(UsageError, match=r"in a \(nan\)"):
        headroom({"a": float("nan"), "b": 1.0})


@pytest.mark.parametrize("name", ["flux-tiny", "latte-tiny", "dit"])
def test_magnitudes_are_those_of_the_pass(name: str) -> None:
    preset = TINY if name == "dit" else get_preset(name)
    model, inputs = random_dynamic(preset), NoisedInputs(preset=preset, batch_size=2)
    magnitudes = measure_magnitudes(model, inputs, [0.3])
    with torch.no_grad():
        expected = model(inputs.at(0.3)).sample
    final = "proj_out_2" if name == "dit" else "proj_out"
    assert magnitudes[final] == pytest.approx(float(expected.abs().max()), rel=1e-5)
    assert sum(layer.endswith(".scores") for layer in magnitudes) == model.depth
    assert headroom(magnitudes) == pytest.approx(FP16_MAX / max(magnitudes.values()))


def test_scores_are_scaled_products_of_queries_and_keys() -> None:
    model = random_dynamic(TINY)
    seen = {}
    for name in ("to_q", "to_k"):
        layer = getattr(model.backbone.transformer_blocks[0].attn1, name)
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    magnitude = measure_magnitudes(model, INPUTS, [0.5])["transformer_blocks.0.scores"]
    query, key = (seen[name].unflatten(-1, (TINY.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k"))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    assert magnitude == pytest.approx(float(scores.abs().max()), rel=1e-5)


def test_a_build_stops_before_it_writes_an_overflowing_graph(tmp_path: Path) -> None:
    save_dynamic(overflowing(), tmp_path / "given", TINY)
    given = {"random_weights": False, "checkpoint": str(tmp_path / "given"), "budget": None, "precision": "fp16"}
    settings = tiny_settings(tmp_path, **given)
    with pytest.raises(UsageError, match=MLP):
        build(settings)
    assert not settings.out.exists()
    assert json.loads((settings.work / "magnitudes.json").read_text())[MLP] > FP16_MAX


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(tiny_settings(tmp_path_factory.mktemp("half"), precision="fp16", engines=2, token_path="masked"))


def test_an_fp16_bundle_equals_the_masked_model(half: Bundle) -> None:
    assert half.manifest.model.precision == "fp16"
    assert half.manifest.metrics["fp16_headroom"] > 10
    report = verify_bundle(half.root, VerifySettings(timesteps=8, layers=True))
    assert report.passed
    assert report.layers is not None
    assert len(report.layers.layers) > 20
    assert report.tolerance == report.layers.tolerance == TOLERANCES["fp16"]
    assert report.relative_error is not None
    assert 1e-6 < report.relative_error < 5e-3, "rounded, and no more than that"


def test_an_error_in_half_precision_is_found(half: Bundle) -> None:
    report = verify_bundle(half.root, VerifySettings(timesteps=4, tolerance=1e-5))
    assert not report.passed


def test_a_bf16_bundle_says_what_cannot_run_it(tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, precision="bf16"))
    transformer = load(bundle.root)
    with pytest.raises(EngineMismatchError, match="in bf16, for which ONNX Runtime has no CPU kernels; run it with"):
        transformer(**INPUTS.at(0.5))


def test_half_precision_takes_fewer_bytes(half: Bundle, tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path, token_path="masked"), NullListener()) as run:
        whole = price_plans(run, [2])[0].plan
    assert half.manifest.plan.disk_bytes < 0.7 * whole.disk_bytes
