"""Calibration is on a GPU where passes fit there, whatever else a build needs of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.backbones.base import Inputs
from dyexport.lora import LoraSpec
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline import calibrate, placing
from dyexport.pipeline.placing import place
from dyexport.pipeline.settings import BuildSettings
from tests.pipeline.tiny import build, tiny_settings

CPU = {"device": "cpu", "stream": False, "base": "fp32"}
GB = 1e9


@pytest.fixture
def flux(tmp_path: Path) -> tuple[BuildSettings, NoisedInputs]:
    settings = BuildSettings(
        out=tmp_path / "bundle", work=tmp_path / "work", model="flux", random_weights=True, budget=0.5, memory=0
    )
    return settings, NoisedInputs(preset=settings.preset, batch_size=1)


def gpu(free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "best_device", lambda: "cuda")
    monkeypatch.setattr(placing, "free_memory", lambda: free)


def test_without_a_gpu_a_model_larger_than_memory_is_streamed(flux: tuple[BuildSettings, NoisedInputs]) -> None:
    placement, inputs = place(*flux, bf16=True)
    assert (placement, inputs) == ({**CPU, "stream": True}, flux[1])
    assert place(*flux, whole=True)[0] == CPU, "its weights are changed in memory"


def test_a_model_that_is_read_for_every_pass_has_larger_passes(
    flux: tuple[BuildSettings, NoisedInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(48 * GB, monkeypatch)
    placement, inputs = place(*flux, bf16=True)
    assert placement == {"device": "cuda", "stream": True, "base": "fp32"}
    assert (flux[1].per_pass, inputs.per_pass) == (1, 3)
    gpu(8 * GB, monkeypatch)
    placement, inputs = place(*flux, bf16=True)
    assert placement["stream"]
    assert inputs.per_pass == 1, "three samples do not fit"
    gpu(20 * GB, monkeypatch)
    assert place(*flux, bf16=True)[1].per_pass == 3, "as docs/howto/memory.md says"
    gpu(2 * GB, monkeypatch)
    assert place(*flux, bf16=True)[0] == {**CPU, "stream": True}


def test_a_model_that_fits_is_loaded_once(
    flux: tuple[BuildSettings, NoisedInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(80 * GB, monkeypatch)
    assert place(*flux, bf16=True) == ({"device": "cuda", "stream": False, "base": "bf16"}, flux[1])
    assert place(*flux, bf16=True, whole=True)[0] == CPU, "in fp32 it does not fit"
    gpu(141 * GB, monkeypatch)
    assert place(*flux, whole=True)[0] == {"device": "cuda", "stream": False, "base": "fp32"}


class Placed(NoisedInputs):
    """Inputs that have no default device: those of a pass must be where its model is."""

    def over(self, timesteps: Sequence[float], repeat: int = 0, device: Any = None) -> Inputs:
        assert device == torch.device("cpu")
        passes.append(len(timesteps))
        return super().over(timesteps, repeat, device)

    def at(self, t: float, repeat: int = 0, device: Any = None) -> Inputs:
        return self.over((t,), repeat, device)


passes: list[int] = []


@pytest.mark.build
@pytest.mark.parametrize(
    "given",
    [
        {"finetune_steps": 0, "random_weights": True},
        {"quantize": "int8"},
        {"precision": "fp16"},
        {"td_lora": LoraSpec(rank=2, experts=2, alpha=2), "merge_tolerance": 1.0},
    ],
    ids=["repair", "ranges", "magnitudes", "merging"],
)
def test_inputs_of_every_pass_are_made_for_the_device_of_the_model(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def placed(settings: BuildSettings, inputs: NoisedInputs, **options: bool) -> Any:
        placement, same = place(settings, inputs, **options)
        return placement, Placed(**{field.name: getattr(same, field.name) for field in fields(same)})

    monkeypatch.setattr(calibrate, "place", placed)
    passes.clear()
    build(tiny_settings(tmp_path, **given))
    assert passes
