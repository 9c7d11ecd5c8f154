from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dyexport.backbones.base import Preset
from dyexport.errors import UsageError
from dyexport.training.synthetic import SHARD_SAMPLES, SyntheticConfig, generate
from tests.training.helpers import DIT, SIT, backbone

COUNT = SHARD_SAMPLES + 6
CONFIG = SyntheticConfig(samples=COUNT, steps=3)


class PointsAt(torch.nn.Module):
    """Predicts exactly what leads to latents equal to the label, under either objective."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> PointsAt:
        clean = class_labels.float()[:, None, None, None] / 10
        t = timestep.float()[:, None, None, None]
        if self.preset.objective == "flow":
            self.sample = (clean - hidden_states) / (1 - t)
        else:
            alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[timestep][:, None, None, None]
            self.sample = (hidden_states - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return self


@pytest.mark.parametrize("preset", [SIT, DIT], ids=["flow", "ddpm"])
def test_sampling_reaches_what_the_model_points_at(preset: Preset, tmp_path: Path) -> None:
    config = SyntheticConfig(samples=20, steps=20, guidance=1.0)
    batch = generate(PointsAt(preset), preset, config, tmp_path).batch(torch.arange(20))
    torch.testing.assert_close(
        batch.latents.mean(dim=(1, 2, 3)), batch.conditions["class_labels"] / 10, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("preset", [SIT, DIT], ids=["flow", "ddpm"])
def test_killed_generation_goes_on_and_ends_the_same(preset: Preset, tmp_path: Path) -> None:
    whole = generate(backbone(preset), preset, CONFIG, tmp_path / "whole")

    def stop(done: int, total: int, detail: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(backbone(preset), preset, CONFIG, tmp_path / "killed", stop)
    first = next((tmp_path / "killed").iterdir())
    written = first.stat().st_mtime_ns
    reports: list[tuple[int, int, str]] = []
    resumed = generate(backbone(preset), preset, CONFIG, tmp_path / "killed", lambda *counts: reports.append(counts))
    assert reports == [
        *((3 + step, 6, f"{SHARD_SAMPLES} of {COUNT} samples") for step in range(3)),
        (6, 6, f"{COUNT} of {COUNT} samples"),
    ]
    assert first.stat().st_mtime_ns == written
    everything = torch.arange(COUNT)
    assert torch.equal(resumed.batch(everything).latents, whole.batch(everything).latents)
    assert torch.equal(whole.batch(everything).conditions["class_labels"], everything % preset.classes)


def test_other_weights_or_settings_start_over(tmp_path: Path) -> None:
    everything = torch.arange(6)
    before = generate(backbone(SIT), SIT, CONFIG, tmp_path).batch(everything).latents.clone()
    other = backbone(SIT)
    torch.nn.init.normal_(other.proj_out_2.weight)
    assert not torch.equal(generate(other, SIT, CONFIG, tmp_path).batch(everything).latents, before)
    fewer = SyntheticConfig(samples=6, steps=3)
    assert len(generate(other, SIT, fewer, tmp_path)) == 6


def test_no_samples_or_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="steps of synthetic data is 0; give 1 to 1000"):
        SyntheticConfig(steps=0)
