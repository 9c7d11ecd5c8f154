"""Calibration is on a GPU where passes fit there, whatever else a build needs of its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline import placing
from dyexport.pipeline.placing import place
from dyexport.pipeline.settings import BuildSettings

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
