"""From settings to a bundle: what each stage leaves, what is redone, and what a bundle needs nothing else for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING
from dyexport.bundle.manifest_file import MANIFEST
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.checkpoints.static import load_static, save_static
from dyexport.commands.results import missed_line
from dyexport.errors import BudgetError, CheckpointError, DyexportError, DyexportWarning, StorageError, UsageError
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline.build import build_bundle, calibrate_model, opened, price_plans, train_control
from dyexport.pipeline.settings import BuildSettings
from dyexport.runtime.loading import load
from dyexport.stages.ledger import NullListener
from dyexport.stages.locking import locked_output
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import TINY, build, hashes, tiny_settings


def reused(settings: BuildSettings) -> dict[str, bool]:
    with opened(settings, NullListener()) as run:
        build_bundle(run)
        return {name: outcome.reused for name, outcome in run.ledger.outcomes.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """A build of one engine that was done once; tests change a copy of it."""
    settings = tiny_settings(tmp_path_factory.mktemp("built"))
    build(settings)
    return settings


@pytest.fixture
def settings(built: BuildSettings, tmp_path: Path) -> BuildSettings:
    shutil.copytree(built.out.parent, tmp_path / "copy")
    return replace(built, out=tmp_path / "copy" / "bundle", work=tmp_path / "copy" / "work")


def test_a_second_build_does_nothing(settings: BuildSettings) -> None:
    before = {path: path.stat().st_mtime_ns for path in settings.out.rglob("*")}
    assert all(reused(settings).values())
    assert {path: path.stat().st_mtime_ns for path in settings.out.rglob("*")} == before


def test_the_same_build_elsewhere_is_the_same_to_the_byte(built: BuildSettings, tmp_path: Path) -> None:
    build(tiny_settings(tmp_path))
    assert hashes(tmp_path / "bundle") == hashes(built.out)


def test_the_manifest_says_nothing_of_where_or_when(settings: BuildSettings) -> None:
    text = (settings.out / MANIFEST).read_text()
    assert json.loads(text)["reference"]["path"] == "../work/calibrated"
    assert str(settings.out.parent) not in text


@pytest.mark.parametrize("victim", ["calibrated/routers.safetensors", "graphs/weights.bin", "plan.json"])
def test_damage_to_a_stage_is_repaired(settings: BuildSettings, victim: str) -> None:
    content = bytearray((settings.work / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (settings.work / victim).write_bytes(content)
    before = hashes(settings.out)
    outcomes = reused(settings)
    assert [name for name, again in outcomes.items() if not again] == [
        {"calibrated": "calibrate", "graphs": "weights", "plan.json": "plan"}[victim.split("/")[0]]
    ]
    assert hashes(settings.out) == before


def test_a_bundle_is_refused_at_once_while_another_build_writes_it(settings: BuildSettings) -> None:
    with locked_output(settings.out), opened(settings, NullListener()) as run:
        with pytest.raises(StorageError, match="another command is writing"):
            build_bundle(run)
        assert run.ledger.outcomes == {}


def test_damage_to_the_bundle_is_repaired(settings: BuildSettings) -> None:
    before = hashes(settings.out)
    (settings.out / "graphs" / "segment-00.onnx").write_bytes(b"")
    (settings.out / "graphs" / "weights.bin").unlink()
    (settings.out / "notes.txt").write_text("mine")
    assert [name for name, again in reused(settings).items() if not again] == ["bundle"]
    assert hashes(settings.out) == {**before, "notes.txt": hashes(settings.out)["notes.txt"]}


def test_fewer_engines_leave_no_graph_behind(settings: BuildSettings) -> None:
    two = replace(settings, engines=2)
    outcomes = reused(two)
    assert not outcomes["plan"]
    assert outcomes["calibrate"]
    assert (settings.out / "graphs" / "segment-01.onnx").exists()
    build(settings)
    assert not (settings.out / "graphs" / "segment-01.onnx").exists()
    assert len(Bundle.open(settings.out).manifest.plan.segments) == 1


def test_a_budget_is_met_as_run(settings: BuildSettings) -> None:
    plan = Bundle.open(settings.out).manifest.plan
    assert plan.flops_ratio == pytest.approx(0.5, abs=0.01)
    assert plan.flops_ratio <= plan.network_flops_ratio <= plan.executed_flops_ratio


def test_without_routers_and_training_units_are_chosen_by_importance(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, finetune_steps=0)
    with opened(settings, NullListener()) as run:
        model, _ = load_dynamic(calibrate_model(run).path)
        metrics = calibrate_model(run).metrics
        plan = price_plans(run, [4])[0].plan
    assert model.table is not None
    assert not model.has_token_routers
    assert metrics["flops_ratio"] == pytest.approx(0.5, abs=0.01)
    assert metrics["flops_ratio"] == pytest.approx(plan.flops_ratio, abs=1e-3)
    assert 0 < metrics["output_relative_mse"] < 1
    assert {path for segment in plan.segments for path in segment.token_paths} == {"all"}


class RecordingListener(NullListener):
    """Keeps the progress of a stage, phase by phase."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.phases: dict[str, list[tuple[int, int]]] = {}

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == self.stage:
            self.phases.setdefault(detail, []).append((done, total))


@pytest.mark.parametrize(
    ("values", "phases"),
    [({"finetune_steps": 0}, ["importance", "comparison before repair", "repair"]), ({}, ["budget", "tokens"])],
)
def test_calibration_tells_how_far_it_is(tmp_path: Path, values: dict[str, Any], phases: list[str]) -> None:
    listener = RecordingListener("calibrate")
    with opened(tiny_settings(tmp_path, **values), listener) as run:
        calibrate_model(run)
    assert list(listener.phases) == [*phases, "comparison"]
    for steps in listener.phases.values():
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1] > 1


def test_a_calibrated_checkpoint_without_budget_is_kept(settings: BuildSettings, tmp_path: Path) -> None:
    checkpoint = str(settings.work / "calibrated")
    given = tiny_settings(tmp_path, budget=None, random_weights=False, checkpoint=checkpoint)
    with opened(given, NullListener()) as run:
        again, _ = load_dynamic(calibrate_model(run).path)
    before, _ = load_dynamic(settings.work / "calibrated")
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_training_leaves_a_dense_baseline_of_the_static_model(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, budget=1.0, random_weights=False, train_steps=3, finetune_steps=3, baseline=True)
    bundle = build(settings)
    assert not (settings.work / "training").exists()
    static = load_static(str(settings.work / "static"), TINY)
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([0.3, 0.3]),
        "class_labels": torch.tensor([1, 2]),
    }
    with torch.no_grad():
        truth = static(**inputs).sample
    assert DENSE_CONDITIONING in bundle.engine_paths("onnx"), "fine-tuning moves the dynamic model's"
    transformer = load(bundle.root, dense=True)
    assert (transformer(**inputs).sample - truth).abs().max() < 1e-5
    with opened(settings, NullListener()) as run:
        build_bundle(run)
        assert all(outcome.reused for outcome in run.ledger.outcomes.values())
        control = load_static(str(train_control(run).path), TINY)
    assert not torch.equal(control.proj_out_2.weight, static.proj_out_2.weight)


def test_untrained_weights_are_the_baselines_too(settings: BuildSettings) -> None:
    bundle = build(replace(settings, baseline=True))
    assert bundle.engine_paths("onnx").keys() == {"segment-00", CONDITIONING, DENSE}
    static = load_static(str(settings.work / "static"), TINY)
    latents, t, labels = torch.randn(3, 1, 8, 8), torch.full((3,), 0.7), torch.tensor([1, TINY.classes, 2])
    with torch.no_grad():
        truth = static(latents, t, labels).sample
    sample = load(bundle.root, dense=True)(latents, t, labels).sample
    assert (sample - truth).abs().max() < 1e-5


def static_checkpoint(directory: Path) -> Path:
    save_static(random_backbone(TINY), directory)
    return directory


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("sit-digits", r"num_attention_heads is 8, sit-digits has 4"),
        ("dit-s-2", r"num_attention_heads is 8, dit-s-2 has 6"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_built_with_a_warning(tmp_path: Path, model: str, message: str) -> None:
    checkpoint = str(static_checkpoint(tmp_path / "static"))
    given = {"model": model, "random_weights": False, "checkpoint": checkpoint, "finetune_steps": 0}
    with pytest.warns(UserWarning, match=rf"{message}; the model is built as static"):
        bundle = build(tiny_settings(tmp_path, **given))
    assert bundle.manifest.model.name == "static"
    assert bundle.manifest.model.config["num_attention_heads"] == 8


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    backbone = random_backbone(TINY)
    with torch.no_grad():
        backbone.proj_out_1.weight[3, 5] = torch.nan
    save_static(backbone, tmp_path / "static")
    settings = tiny_settings(tmp_path, random_weights=False, checkpoint=str(tmp_path / "static"), finetune_steps=0)
    with pytest.raises(CheckpointError, match=r"proj_out_1\.weight holds NaN or infinity"):
        build(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["static"]


@pytest.mark.parametrize("model", ["dit-s-2", "dit-xl-2"])
def test_no_checkpoint_names_both_ways_out(tmp_path: Path, model: str) -> None:
    settings = BuildSettings(model=model, out=tmp_path / "b", work=tmp_path / "w", budget=0.5, finetune_steps=0)
    with pytest.raises(CheckpointError, match=r"--checkpoint .*--random-weights"):
        build(settings)
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_checkpoint_of_another_model(settings: BuildSettings, tmp_path: Path) -> None:
    given = {"checkpoint": str(settings.work / "calibrated"), "out": tmp_path / "b", "work": tmp_path / "w"}
    with pytest.raises(CheckpointError):
        build(BuildSettings(model="sit-digits", budget=0.5, **given))


def test_a_budget_out_of_reach_is_said(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"budget 0\.001"):
        build(tiny_settings(tmp_path, budget=0.001, finetune_steps=0))


def test_export_alone_runs_no_stage_before_it(settings: BuildSettings, tmp_path: Path) -> None:
    barred = frozenset({"static", "dynamic", "calibrate"})
    with opened(replace(settings, engines=2), NullListener(), without=barred) as run:
        assert len(build_bundle(run).plan.segments) == 2
    with (
        pytest.raises(UsageError, match="stage 'static' must run first"),
        opened(tiny_settings(tmp_path), NullListener(), without=barred) as fresh,
    ):
        build_bundle(fresh)
    with (
        pytest.raises(UsageError, match="stage 'calibrate' must run first"),
        opened(replace(settings, budget=0.6), NullListener(), without=barred) as other,
    ):
        build_bundle(other)


def test_a_read_only_output_is_found_first(built: BuildSettings) -> None:
    with pytest.raises(DyexportError, match="cannot write /proc/bundle"):
        build(replace(built, out=Path("/proc/bundle")))


def test_widths_change_with_t(settings: BuildSettings) -> None:
    widths = Bundle.open(settings.out).widths
    shares = widths.heads.mean(axis=(1, 2))
    assert np.ptp(shares) > 0.1


def test_routers_of_too_short_a_run_give_way_to_importance(tmp_path: Path) -> None:
    """After three steps all gates switch at once: no shift meets the budget, and the build says what it did."""
    settings = tiny_settings(tmp_path, budget=0.7, random_weights=False, train_steps=2, finetune_steps=3)
    with pytest.warns(
        DyexportWarning, match=r"budget 0\.7 cannot be met .* chosen by importance meet it instead, .*; "
    ):
        bundle = build(settings)
    missed = bundle.manifest.metrics["missed_flops_ratio"]
    assert abs(missed - 0.7) > 0.01
    line = missed_line({"budget": 0.7, **bundle.manifest.metrics})
    assert line is not None
    assert f"nearest to the budget of 0.7 that they reach is {missed:.3f}" in line
    assert bundle.manifest.plan.flops_ratio == pytest.approx(0.7, abs=0.01)
    assert bundle.token_stats is not None
    assert bundle.token_stats.mean_fraction([0.5]).min() == 1
    assert verify_bundle(bundle.root, VerifySettings(timesteps=8)).passed
