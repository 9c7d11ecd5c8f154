"""FLUX through data, synthetic data and fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dyexport.backbones.flux.preset import FluxPreset
from dyexport.errors import DataError
from dyexport.models.random_weights import random_backbone
from dyexport.presets import PRESETS
from dyexport.training.data import ShardDirectory, open_source
from dyexport.training.losses import SigmaFlowObjective
from dyexport.training.synthetic import SyntheticConfig, generate

PRESET = PRESETS["flux-tiny"]
assert isinstance(PRESET, FluxPreset)
SMALL = replace(PRESET, name="flux-small", side=4, double_blocks=1, single_blocks=1, text_tokens=5)


def shards(directory: Path, **changes: Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    tensors = {
        "latents": torch.randn(8, 16, 16),
        "prompt_embeds": torch.randn(8, 5, 64),
        "pooled_prompt_embeds": torch.randn(8, 32),
    }
    save_file({**tensors, **changes}, directory / "a.safetensors")
    return directory


def test_sigma_is_the_share_of_noise_and_velocity_points_to_it() -> None:
    clean, noise = torch.randn(2, 16, 4), torch.randn(2, 16, 4)
    batch = SigmaFlowObjective().noisy(clean, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(batch.latents[0], clean[0])
    assert torch.equal(batch.latents[1], noise[1])
    torch.testing.assert_close(batch.latents[0] + batch.target[0], noise[0])
    assert torch.equal(SigmaFlowObjective().loss(batch.target + 2, batch), torch.full((2,), 4.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(8, 64, 16)}, r"latents are \(8, 64, 16\); flux-small takes \(8, 16, 16\)"),
        ({"prompt_embeds": torch.zeros(8, 5, 63)}, r"prompt_embeds are \(8, 5, 63\); flux-small takes \(8, any, 64\)"),
        ({"pooled_prompt_embeds": torch.zeros(7, 32)}, r"pooled_prompt_embeds are \(7, 32\)"),
    ],
)
def test_a_bad_shard_is_named(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(str(shards(tmp_path, **changes)), SMALL)


def test_shards_of_different_prompt_lengths_do_not_mix(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    shards(tmp_path, prompt_embeds=torch.randn(8, 9, 64))
    with pytest.raises(DataError, match=r"b\.safetensors: prompt_embeds are \(8, 5, 64\) and in a\.safetensors"):
        open_source(str(tmp_path), SMALL)


class PointsAt(torch.nn.Module):
    """Predicts the velocity that ends at latents equal to the first pooled channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, timestep: Tensor, pooled_projections: Tensor, **_: Tensor) -> object:
        clean = pooled_projections[:, :1, None]
        return SimpleNamespace(sample=(hidden_states - clean) / timestep[:, None, None])


@pytest.mark.parametrize("guidance", [3.5, None], ids=["shifted", "not shifted"])
def test_sampling_reaches_what_the_model_points_at(guidance: float | None, tmp_path: Path) -> None:
    prompts = {"encoder_hidden_states": torch.randn(3, 5, 64), "pooled_projections": torch.randn(3, 32)}
    preset = replace(SMALL, guidance=guidance)
    source = generate(PointsAt(), preset, SyntheticConfig(samples=7, steps=4), tmp_path, prompts=prompts)
    latents, conditions = source.batch(torch.arange(7))
    pooled = prompts["pooled_projections"][torch.arange(7) % 3]
    assert torch.equal(conditions["pooled_projections"], pooled)
    torch.testing.assert_close(latents, pooled[:, :1, None].expand_as(latents), atol=1e-4, rtol=0)


def test_other_prompts_start_over(tmp_path: Path) -> None:
    backbone, config = random_backbone(SMALL), SyntheticConfig(samples=2, steps=1)

    def generated(prompts: dict[str, Tensor] | None) -> Tensor:
        source: ShardDirectory = generate(backbone, SMALL, config, tmp_path, prompts=prompts)
        return source.batch(torch.arange(2)).latents

    free = generated(None)
    assert torch.equal(generated(None), free)
    prompts = {"encoder_hidden_states": torch.randn(2, 5, 64), "pooled_projections": torch.randn(2, 32)}
    assert not torch.equal(generated(prompts), free)
