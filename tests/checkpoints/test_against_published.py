"""Against the published DyDiT code itself; runs where DYEXPORT_DYDIT_REPO names a checkout of it.

DYEXPORT_DYDIT_REPO=path/to/DyDiT python -m pytest -q -s tests/models/test_against_published.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyexport.backbones.base import Inputs, Preset
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.checkpoints.dynamic import load_with_routers
from dyexport.checkpoints.static import load_static
from dyexport.models.inputs import NoisedInputs
from dyexport.presets import get_preset
from dyexport.runtime.loading import load
from tests.checkpoints.dydit_repo import DYDIT, DYFLUX, published_code, random_dyflux, random_published
from tests.factories import random_timesteps
from tests.pipeline.tiny import build, tiny_settings

CHECKOUT = os.environ.get("DYEXPORT_DYDIT_REPO", "")
TOLERANCE = 1e-4
MEDIUM = replace(
    get_preset("dit-s-2"), name="dit-medium", layers=5, hidden_size=192, heads=8, sample_size=16, classes=9
)
PRESETS = (MEDIUM, replace(MEDIUM, name="sit-medium", backbone="sit", learn_sigma=False), get_preset("dit-s-2"))

pytestmark = pytest.mark.skipif(not CHECKOUT, reason="DYEXPORT_DYDIT_REPO names no checkout of the published code")


@dataclass(frozen=True)
class Published:
    preset: Preset
    model: nn.Module
    file: Path

    def compare(self, what: str, run: Callable[[Inputs], Tensor], *, complete: bool = False) -> None:
        """Print and judge the worst relative error over many t, whole and real."""
        draws = random_timesteps(self.preset, 24)
        whole = [float(int(t)) for t in draws[:12]] if self.preset.objective == "ddpm" else [0.0, 0.5]
        errors = [self.error(t, run, complete) for t in (*whole, *draws[12:])]
        print(f"{self.preset.name}: {what} against the published code: worst relative error {max(errors):.1e}")
        assert max(errors) <= TOLERANCE

    @torch.no_grad()
    def error(self, t: float, run: Callable[[Inputs], Tensor], complete: bool) -> float:
        arguments = NoisedInputs(preset=self.preset, batch_size=2).at(t)
        names = ("hidden_states", "timestep", "class_labels")
        truth, *_ = self.model(*(arguments[name] for name in names), complete_model=complete)
        sample = run(arguments)
        return relative_error(sample, truth)


def relative_error(sample: Tensor, truth: Tensor) -> float:
    assert sample.shape == truth.shape
    assert truth.isfinite().all()
    assert sample.isfinite().all()
    return float((sample - truth).abs().max() / truth.abs().max())


@pytest.fixture(params=PRESETS, ids=lambda preset: preset.name)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Published]:
    preset: Preset = request.param
    with published_code(Path(CHECKOUT), DYDIT) as code:
        model = random_published(code, preset)
        torch.save({"model": {}, "ema": model.state_dict(), "opt": {}}, tmp_path / "dydit.pt")
        yield Published(preset, model, tmp_path / "dydit.pt")


@torch.no_grad()
def test_the_masked_model(published: Published) -> None:
    model = load_with_routers(published.file, published.preset)
    published.compare("masked model", lambda arguments: model(arguments).sample)
    output = model(NoisedInputs(preset=published.preset, batch_size=2).at(0.5))
    for gates in output[1:4]:
        assert 0.2 < float(gates.mean()) < 0.95, "these gates test little"


def test_the_static_model(published: Published) -> None:
    names = published.model.state_dict()
    static = {name: names[name] for name in names if "_rate." not in name and "token_selection" not in name}
    torch.save(static, published.file.with_name("dit.pt"))
    for file in (published.file, published.file.with_name("dit.pt")):
        model = load_static(str(file), published.preset)
        published.compare(f"static model of {file.name}", lambda a, m=model: m(**a).sample, complete=True)


def built(root: Path, preset: Preset, file: Path) -> Callable[..., Any]:
    """A bundle of a file, with its routers as they are, as a transformer."""
    given = {"budget": None, "random_weights": False, "checkpoint": str(file), "engines": 4}
    settings = replace(tiny_settings(root, **given), model=preset)
    assert settings.routers == "given"
    build(settings)
    return load(settings.out)


def test_the_bundle(published: Published, tmp_path: Path) -> None:
    bundle = built(tmp_path, published.preset, published.file)
    published.compare("bundle of 4 engines", lambda arguments: bundle(**arguments).sample)


@torch.no_grad()
def test_flux(tmp_path: Path) -> None:
    preset = get_preset("flux-tiny")
    assert isinstance(preset, FluxPreset)
    errors: dict[str, list[float]] = {"masked model": [], "bundle": []}
    kept = []
    with published_code(Path(CHECKOUT), DYFLUX) as code:
        published = random_dyflux(code, preset)
        torch.save({"module": published.state_dict(), "step": 7}, tmp_path / "dyflux.pt")
        model = load_with_routers(tmp_path / "dyflux.pt", preset)
        bundle = built(tmp_path, preset, tmp_path / "dyflux.pt")
        for t in random_timesteps(preset, 24):
            inputs = NoisedInputs(preset=preset, batch_size=2).at(t)
            ids = {name: inputs[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}  # as published
            truth = published(**{**inputs, **ids}).sample
            output = model(inputs)
            assert output.heads.all()
            assert output.groups.all()
            errors["masked model"].append(relative_error(output.sample, truth))
            errors["bundle"].append(relative_error(bundle(**inputs).sample, truth))
            kept.append(float(output.tokens.mean()))
    for what, found in errors.items():
        print(f"flux-tiny: {what} against the published code: worst relative error {max(found):.1e}")
        assert max(found) <= TOLERANCE
    assert 0.2 < sum(kept) / len(kept) < 0.95, "these gates test little"
