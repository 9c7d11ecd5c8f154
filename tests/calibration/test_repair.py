"""Repair of networks that are cut without training: nearer to the dense model, and exact in every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dyexport.backbones import BACKBONES
from dyexport.bundle.tables import UnitOrder
from dyexport.calibration.repair import RIDGE, fit_projections, least_squares
from dyexport.calibration.widths import choose_widths, trajectory_points
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.presets import get_preset
from dyexport.runtime.loading import load
from dyexport.slicing.slicer import SliceContext, cut_inputs
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.factories import spec_of, tiny_model, tiny_preset
from tests.pipeline.tiny import build, tiny_settings


def test_least_squares_is_the_textbook_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, targets = (torch.randn(50, width, generator=generator) for width in (6, 3))
    weight, bias = least_squares(rows, targets)
    x, y = rows.double().numpy(), targets.double().numpy()
    centered = x - x.mean(0)
    gram = centered.T @ centered
    expected = np.linalg.solve(gram + RIDGE * np.diag(gram).mean() * np.eye(6), centered.T @ (y - y.mean(0))).T
    np.testing.assert_allclose(weight.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(bias.numpy(), y.mean(0) - expected @ x.mean(0), atol=1e-5)


def test_inputs_that_are_never_on_keep_their_weights() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    rows[:, 2] = 0
    weight, _ = least_squares(rows, rows[:, :2] * 3)
    assert (weight[:, 2] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_repaired_model_is_nearer_to_the_dense_one(backbone: str) -> None:
    preset = tiny_preset(backbone)
    model = tiny_model(backbone, tokens=False)
    inputs = NoisedInputs(preset=preset, batch_size=4)
    with torch.enable_grad():
        model.table = choose_widths(model, inputs, 0.6, FlopsModel.of_preset(preset), count=4, probes=1)
    points = trajectory_points(preset.timestep_range, 4).tolist()
    before = distance(model, NoisedInputs(preset=preset, batch_size=4, seed=1), points)
    dense = dense_outputs(model, NoisedInputs(preset=preset, batch_size=4, seed=1), points)
    weights = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    context = SliceContext.of(spec_of(preset), model.table, None)
    names = cut_inputs(context, UnitOrder.of(model.table))

    fit_projections(model, names, inputs, points, lambda name, *change: changes.update({name: change}))

    assert set(changes) == set(names)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights[name]), "fitting changes nothing"
    for name, (weight, bias) in changes.items():
        linear = model.backbone.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight += weight
        linear.bias += bias
    after = distance(model, NoisedInputs(preset=preset, batch_size=4, seed=1), points, dense)
    assert after < 0.8 * before


def test_a_bundle_built_without_training_is_repaired_and_exact(tmp_path: Path) -> None:
    """Also for a model whose weights are read layer by layer. The dense network keeps its own projections."""
    whole, streamed = (
        build(tiny_settings(tmp_path / name, finetune_steps=0, budget=0.6, engines=2, baseline=True, memory=memory))
        for name, memory in (("whole", None), ("streamed", 0))
    )
    metrics = whole.manifest.metrics
    assert metrics["output_relative_mse"] < 0.8 * metrics["unrepaired_relative_mse"]
    assert streamed.manifest.metrics["output_relative_mse"] == pytest.approx(metrics["output_relative_mse"], rel=1e-3)
    for bundle in (whole, streamed):
        assert verify_bundle(bundle.root, VerifySettings(timesteps=6)).passed
    static = DiTTransformer2DModel.from_pretrained(tmp_path / "whole" / "work" / "static").eval()
    inputs = NoisedInputs(preset=get_preset("sit-tiny"), batch_size=2).at(0.3)
    with torch.no_grad():
        expected = static(**inputs).sample
        found = load(whole.root, dense=True)(**inputs).sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def dense_outputs(model: DynamicTransformer, inputs: NoisedInputs, points: list[float]) -> list[Tensor]:
    return [model.forward_dense(inputs.at(t)) for t in points]


def distance(
    model: DynamicTransformer, inputs: NoisedInputs, points: list[float], dense: list[Tensor] | None = None
) -> float:
    expected = dense or dense_outputs(model, inputs, points)
    return sum(
        float((model(inputs.at(t)).sample - want).square().sum()) for t, want in zip(points, expected, strict=True)
    )
