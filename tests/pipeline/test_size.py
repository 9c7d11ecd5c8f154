"""What a build keeps of a checkpoint that it takes as it is: links, and never the whole model in memory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyexport.backbones.base import Preset
from dyexport.backbones.calibration_effort import SPARSE
from dyexport.backbones.recipe import LOW_RANK_FINETUNING
from dyexport.checkpoints.dynamic import save_dynamic
from dyexport.exporters.onnx_graph import STORE
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.pipeline.build import build_bundle, calibrate_model, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import PRESETS, get_preset
from dyexport.stages.ledger import NullListener
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import build, shallow

SHALLOW = replace(shallow("flux-tiny"), recipe=replace(get_preset("flux-tiny").recipe, calibration=SPARSE))
"""Calibrated as large models are: nothing is repaired, so that the weights stay where they are."""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A FLUX in bf16, as diffusers writes large ones."""
    return save_shards(tmp_path / "checkpoint", get_preset("flux-tiny"))


@pytest.fixture
def shallow_shards(tmp_path: Path) -> Path:
    """One with few blocks, where a whole bundle is built."""
    return save_shards(tmp_path / "checkpoint", SHALLOW)


def save_shards(directory: Path, preset: Preset) -> Path:
    backbone = random_backbone(preset).to(torch.bfloat16)
    backbone.save_pretrained(directory / "transformer", max_shard_size="500KB")
    assert len(list((directory / "transformer").glob("*-of-*.safetensors"))) > 2
    return directory


def settings_for(checkpoint: Path, root: Path, **values: object) -> BuildSettings:
    given = {"model": "flux-tiny", "budget": 0.5, "finetune_steps": 0, "engines": 2, "baseline": False, **values}
    return BuildSettings(checkpoint=str(checkpoint), out=root / "bundle", work=root / "bundle.work", **given)


def weights_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("diffusion_pytorch_model*.safetensors"))


def calibrate(settings: BuildSettings) -> tuple[str, list[str]]:
    """What identifies the calibrated model, and the stages that ran for it."""
    with opened(settings, NullListener()) as run:
        digest = calibrate_model(run).calibrated.digest
        return digest, [name for name, outcome in run.ledger.outcomes.items() if not outcome.reused]


def calibrated_metrics(settings: BuildSettings) -> dict[str, float]:
    with opened(settings, NullListener()) as run:
        return calibrate_model(run).metrics


def test_shards_are_linked_and_the_bundle_is_right(shallow_shards: Path, tmp_path: Path) -> None:
    settings = settings_for(shallow_shards, tmp_path / "built", model=SHALLOW)
    build(settings)
    originals = weights_in(shallow_shards / "transformer")
    for stage in ("static", "dynamic", "calibrated"):
        files = weights_in(settings.work / stage)
        assert [file.name for file in files] == [file.name for file in originals]
        assert all(file.is_symlink() for file in files)
        assert [file.resolve() for file in files] == originals
    assert verify_bundle(settings.out, VerifySettings(timesteps=4)).passed


def test_a_large_store_is_on_the_disk_once(shallow_shards: Path, tmp_path: Path) -> None:
    """It moves into the bundle, and what is left to do is done with the link to it."""
    settings = settings_for(shallow_shards, tmp_path / "built", model=SHALLOW, precision="fp32")
    with opened(settings, NullListener()) as run:
        run.link_store_from = 1
        before = build_bundle(run)
    store = settings.work / "graphs" / STORE
    assert store.is_symlink()
    assert store.samefile(settings.out / "graphs" / STORE)
    (settings.work / "graphs" / "segment-01.onnx").unlink()
    with opened(settings, NullListener()) as run:
        run.link_store_from = 1
        assert build_bundle(run) == before
        assert [name for name, outcome in run.ledger.outcomes.items() if not outcome.reused] == ["onnx segment-01"]
    assert verify_bundle(settings.out, VerifySettings(timesteps=4)).passed


def test_a_large_model_is_calibrated_in_bf16(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, recipe = get_preset("flux-tiny"), replace(LOW_RANK_FINETUNING, calibration=SPARSE)
    monkeypatch.setitem(PRESETS, preset.name, replace(preset, recipe=recipe))
    whole, streamed = settings_for(shards, tmp_path / "whole"), settings_for(shards, tmp_path / "streamed", memory=1)
    assert calibrate(whole)[0] == calibrate(streamed)[0]
    assert calibrate(replace(whole, precision="fp32"))[1] == ["calibrate"]
    assert calibrate(whole)[1] == [], "each precision has a model of its own"
    exact, rounded = calibrated_metrics(replace(whole, precision="fp32")), calibrated_metrics(whole)
    assert rounded["flops_ratio"] == pytest.approx(0.5, abs=0.01)
    assert rounded["output_relative_mse"] != exact["output_relative_mse"]
    # Random weights have many units that matter alike, between which rounding decides.
    assert rounded["output_relative_mse"] == pytest.approx(exact["output_relative_mse"], rel=0.5)


def test_calibration_of_streamed_weights_is_the_same_to_the_byte(shards: Path, tmp_path: Path) -> None:
    whole, streamed = settings_for(shards, tmp_path / "whole"), settings_for(shards, tmp_path / "streamed", memory=1)
    assert calibrate(whole)[0] == calibrate(streamed)[0]


@pytest.mark.parametrize("budget", [None, 0.5])
def test_given_routers_are_streamed_too(tmp_path: Path, budget: float | None) -> None:
    preset = get_preset("flux-tiny")
    save_dynamic(random_dynamic(preset), tmp_path / "given", preset)
    digests = set()
    for memory in (None, 1):
        root = tmp_path / str(memory)
        settings = settings_for(tmp_path / "given", root, finetune_steps=None, budget=budget, memory=memory)
        digests.add(calibrate(settings)[0])
        (file,) = weights_in(settings.work / "calibrated")
        assert file.resolve() == tmp_path / "given" / file.name
    assert len(digests) == 1


def test_a_checkpoint_may_move(shards: Path, tmp_path: Path) -> None:
    settings = settings_for(shards, tmp_path / "built")
    before, _ = calibrate(settings)
    shards.rename(tmp_path / "elsewhere")
    assert calibrate(replace(settings, checkpoint=str(tmp_path / "elsewhere"))) == (before, ["static"])


def test_a_checkpoint_that_changed_is_built_again(shards: Path, tmp_path: Path) -> None:
    settings = settings_for(shards, tmp_path / "built")
    before, _ = calibrate(settings)
    shutil.rmtree(shards)
    random_backbone(get_preset("flux-tiny"), seed=1).to(torch.bfloat16).save_pretrained(shards / "transformer")
    after, ran = calibrate(settings)
    assert ran == ["static", "dynamic", "calibrate"]
    assert after != before
