"""Builds whose training is tracked and evaluated: where that is kept, and that no stage depends on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from typer.testing import CliRunner

from dyexport.cli import app
from dyexport.errors import CheckpointError, MissingDependencyError, UsageError
from dyexport.pipeline.build import finetune_model, opened
from dyexport.pipeline.monitoring import monitoring_of
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.stage_settings import control_settings, dynamic_settings, static_settings
from dyexport.pipeline.training_cost import check_training
from dyexport.pipeline.work_directory import TRACKING
from dyexport.stages.ledger import NullListener
from dyexport.training.evaluation import GAP, PROMPTS
from tests.pipeline.test_low_memory import trained_settings
from tests.pipeline.tiny import tiny_settings
from tests.pipeline.tiny_pipeline import small_vae

DIGITS = {"random_weights": False}


def run(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["finetune", "--json", *map(str, words)])
    assert done.exit_code == 0, done.output
    payload: dict[str, Any] = json.loads(done.stdout)
    return {**payload, "said": done.stderr}


def steps_of(folder: Path, prefix: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if any(name.startswith(prefix) for name in line)]


def test_every_stage_that_trains_is_recorded_and_none_is_made_again(tmp_path: Path) -> None:
    """Static training of sit-tiny takes three steps; its data has a part that is held out."""
    work = tmp_path / "work"
    options = ("--tracker", "tensorboard", "--evaluate-every", 8)
    first = run("--model", "sit-tiny", "-b", 0.5, "--finetune-steps", 12, "--work", work, *options)
    assert f"tensorboard --logdir {work / 'tracking'}" in first["said"].replace("\n", "")
    static, dynamic = (next((work / "tracking").glob(f"{stage}-*")) for stage in ("static", "dynamic"))
    assert (steps_of(static, "train/"), steps_of(dynamic, "train/")) == ([3], [10, 12])
    assert (steps_of(static, "evaluation/"), steps_of(dynamic, "evaluation/")) == ([0, 3], [0, 8, 12])
    assert [path.name for path in sorted((dynamic / "pictures").iterdir())] == [
        f"step-{step:08d}.png" for step in (0, 8, 12)
    ]
    assert list(dynamic.glob("events.out.tfevents.*"))
    settings = BuildSettings.load(work)
    assert (settings.tracker, settings.evaluate_every) == ("tensorboard", 8)
    evaluation = monitoring_of(settings, dynamic).evaluation
    assert evaluation is not None
    assert evaluation.source is not None
    assert evaluation.source.name == "digits/held-out"
    again = run("--work", work, "--tracker", "none", "--evaluate-every", 0)
    assert {stage["status"] for stage in again["stages"].values()} == {"reused"}
    assert BuildSettings.load(work).tracker is None


@pytest.mark.build
def test_pictures_of_prompts_are_decoded_by_the_vae(tmp_path: Path) -> None:
    small_vae().save_pretrained(tmp_path / "vae")
    settings = trained_settings(tmp_path, vae=str(tmp_path / "vae"), evaluate_every=6, base_precision="nf4")
    with opened(settings, NullListener()) as build:
        finetune_model(build)
    (folder,) = (settings.work / TRACKING).iterdir()
    assert steps_of(folder, "evaluation/") == [0, 6]
    assert len(list((folder / "pictures").iterdir())) == 2
    width, height = Image.open(folder / "pictures" / "step-00000006.png").size
    assert width + GAP == PROMPTS * (height + GAP)


def test_no_stage_depends_on_how_it_is_watched(tmp_path: Path) -> None:
    plain = tiny_settings(tmp_path, finetune_steps=5, **DIGITS)
    watched = replace(plain, tracker="wandb", evaluate_every=3)
    for keyed in (static_settings, dynamic_settings, control_settings):
        assert keyed(plain) == keyed(watched)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tracker": "tensorboard", "finetune_steps": 0}, "--tracker is for training, and this build trains nothing"),
        ({"evaluate_every": 5, "finetune_steps": 0}, "--evaluate-every is for training, and this build trains nothing"),
        ({"evaluate_every": -1}, "--evaluate-every is -1"),
        ({"tracker": "tensorbord"}, "--tracker is 'tensorbord'; did you mean 'tensorboard'"),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    settings = trained_settings(tmp_path)
    with pytest.raises(UsageError, match=message):
        replace(settings, td_lora=None if "finetune_steps" in values else settings.td_lora, **values)


def test_a_vae_is_for_pictures_of_evaluations_too(tmp_path: Path) -> None:
    settings = trained_settings(tmp_path)
    with pytest.raises(UsageError, match=r"--vae encodes pictures, and --data is .*or --evaluate-every to see samples"):
        replace(settings, vae="somewhere")
    assert replace(settings, vae="somewhere", evaluate_every=5).vae == "somewhere"
    for every in (0, 5):
        with pytest.raises(UsageError, match="sit-tiny samples pixels, which no VAE decodes; leave --vae out"):
            tiny_settings(tmp_path, vae="somewhere", evaluate_every=every, **DIGITS)


def test_a_vae_that_is_not_the_models_is_refused_at_once(tmp_path: Path) -> None:
    settings = trained_settings(tmp_path, vae=str(tmp_path / "nowhere"), evaluate_every=5)
    small_vae(latent_channels=8).save_pretrained(tmp_path / "wide")
    other = AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    other.save_pretrained(tmp_path / "other")
    for vae, message in {
        "nowhere": "cannot read an AutoencoderKL from .*nowhere.*; give --vae with a local copy",
        "wide": r"the VAE in .*wide has latents \(16, 32\), and .* takes \(16, 16\); give its own --vae",
        "other": "holds a AutoencoderKLQwenImage, and this model takes an AutoencoderKL; give another --vae",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            check_training(replace(settings, vae=str(tmp_path / vae)))


def test_a_tracker_that_is_not_installed_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyexport.training.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="comet_ml is not installed; run: pip install comet_ml"):
        check_training(tiny_settings(tmp_path, tracker="comet_ml", **DIGITS))


def test_recorded_settings_that_no_longer_apply_are_left_out(tmp_path: Path) -> None:
    """A build that trains nothing of a work directory that was tracked."""
    settings = trained_settings(tmp_path, tracker="tensorboard", evaluate_every=5, vae=str(tmp_path))
    settings.save()
    done = CliRunner().invoke(app, ["plan", "--work", str(settings.work), "--finetune-steps", "0", "--json"])
    assert "leave --td-lora out" in str(done.exception)  # which is checked after --vae and --tracker
