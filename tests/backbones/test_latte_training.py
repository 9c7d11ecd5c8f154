"""Latte through data, synthetic data and fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dyexport.backbones.latte.preset import LattePreset
from dyexport.errors import DataError
from dyexport.presets import PRESETS
from dyexport.training.data import open_source
from dyexport.training.losses import DdpmObjective
from dyexport.training.synthetic import SyntheticConfig, generate

PRESET = PRESETS["latte-tiny"]
assert isinstance(PRESET, LattePreset)
SMALL = replace(PRESET, name="latte-small", pairs=1, frames=2, sample_size=4, text_tokens=5)


def shards(directory: Path, **changes: Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    tensors = {"latents": torch.randn(8, 4, 2, 4, 4), "prompt_embeds": torch.randn(8, 5, 32)}
    save_file({**tensors, **changes}, directory / "a.safetensors")
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(8, 4, 3, 4, 4)}, r"\(8, 4, 3, 4, 4\); latte-small takes \(8, 4, 2, 4, 4\)"),
        ({"prompt_embeds": torch.zeros(8, 5, 31)}, r"prompt_embeds are \(8, 5, 31\); latte-small takes \(8, any, 32\)"),
    ],
)
def test_a_bad_shard_is_named(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(str(shards(tmp_path, **changes)), SMALL)


def test_a_video_costs_what_its_frames_cost_as_pictures() -> None:
    """The loss, variational bound included, is a mean over elements, whatever their arrangement."""
    objective = DdpmObjective()
    draw = torch.Generator().manual_seed(0)
    clean, noise, uniform = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4), torch.tensor([0.0, 0.6])
    prediction = torch.randn(2, 8, 3, 4, 4, generator=draw)
    video = objective.loss(prediction, objective.noisy(clean, noise, uniform))  # (2,)
    frames = [
        objective.loss(prediction[:, :, frame], objective.noisy(clean[:, :, frame], noise[:, :, frame], uniform))
        for frame in range(3)
    ]
    torch.testing.assert_close(video, torch.stack(frames).mean(0))


class EchoesText(torch.nn.Module):
    """Predicts noise that is the first channel of the prompt's first token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Tensor) -> object:
        noise = encoder_hidden_states[:, :1, :1, None, None].expand_as(hidden_states)
        return SimpleNamespace(sample=noise)


def test_synthetic_videos_are_guided_away_from_the_unconditional_prompt(tmp_path: Path) -> None:
    def latents(name: str, guidance: float, *texts: float) -> Tensor:
        prompts = {"encoder_hidden_states": torch.tensor(texts)[:, None, None].expand(-1, 5, 32).contiguous()}
        config = SyntheticConfig(samples=1, steps=4, guidance=guidance)
        return generate(EchoesText(), SMALL, config, tmp_path / name, prompts=prompts).batch(torch.tensor([0])).latents

    torch.testing.assert_close(latents("guided", 3.0, 0.2, 0.1), latents("plain", 1.0, 0.1 + 3 * (0.2 - 0.1), 0.1))
    assert not torch.equal(latents("guided", 3.0, 0.2, 0.1), latents("off", 1.0, 0.2, 0.1))
