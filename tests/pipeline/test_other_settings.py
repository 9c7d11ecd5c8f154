"""One work directory and several settings: none loses what another made, and looking at a plan trains nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dyexport.cli import app
from dyexport.errors import UsageError
from dyexport.pipeline.build import build_bundle, calibrate_model, finetune_model, opened, price_plans
from dyexport.pipeline.settings import BuildSettings
from dyexport.stages.ledger import NullListener
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import TINY, build, hashes, redone, tiny_settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """A model fine-tuned for the whole FLOPs, the one budget that three steps can meet."""
    root = tmp_path_factory.mktemp("trained")
    settings = tiny_settings(root, budget=1.0, random_weights=False, train_steps=3, finetune_steps=3)
    build(settings)
    return settings


def models(settings: BuildSettings) -> dict[str, str]:
    """Every file of the stages that a bundle is cut from."""
    return {name: sha for name, sha in hashes(settings.work).items() if name.split("/")[0] in MODELS}


MODELS = ("static", "dynamic", "calibrated")


def test_another_budget_in_the_same_work_directory_loses_nothing(trained: BuildSettings) -> None:
    before = models(trained)
    other = replace(trained, budget=0.9, out=trained.out.with_name("other"))
    with pytest.warns(UserWarning, match=r"budget 0\.9"):
        assert redone(other) >= {"dynamic", "calibrate"}
    assert models(trained) == before
    assert not {"static", "dynamic", "calibrate"} & redone(trained)
    assert not {"static", "dynamic", "calibrate"} & redone(other)
    for settings in (trained, other):
        assert verify_bundle(settings.out, VerifySettings(timesteps=4)).passed


def test_a_longer_training_loses_nothing(trained: BuildSettings) -> None:
    before = models(trained)
    for longer in (replace(trained, finetune_steps=4), replace(trained, train_steps=4), replace(trained, seed=1)):
        with opened(longer, NullListener()) as run:
            assert not finetune_model(run).dynamic.reused
    assert models(trained) == before
    with opened(trained, NullListener()) as run:
        assert calibrate_model(run).calibrated.reused


def plan(settings: BuildSettings, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", "--work", str(settings.work), "--json", *options])
    return done.exit_code, done.stdout if done.exception is None else str(done.exception)


@pytest.mark.parametrize("options", [("-b", "0.8"), ("--finetune-steps", "5"), ("--seed", "7")])
def test_a_plan_trains_nothing(trained: BuildSettings, options: tuple[str, ...]) -> None:
    trained.save()
    before = hashes(trained.work)
    code, said = plan(trained, *options)
    assert code != 0
    assert "must run first" in said
    assert hashes(trained.work) == before


def test_a_plan_of_what_is_trained_is_shown(trained: BuildSettings) -> None:
    trained.save()
    code, said = plan(trained)
    assert code == 0, said
    assert json.loads(said)["plans"][0]["engines"] == 1


def test_a_plan_without_training_calibrates(tmp_path: Path) -> None:
    code, said = plan(
        tiny_settings(tmp_path), "-m", TINY.name, "-b", "0.5", "--random-weights", "--finetune-steps", "0"
    )
    assert code == 0, said


def test_a_plan_of_another_budget_leaves_a_build_as_it_is(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    build(settings)
    before = models(settings)
    code, said = plan(settings, "-b", "0.6")
    assert code == 0, said
    assert models(settings) == before
    assert redone(settings) == set()


def test_a_plan_downloads_nothing_for_a_model_that_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    settings = BuildSettings(
        model="dit-xl-2", budget=0.5, data=str(tmp_path), out=tmp_path / "out", work=tmp_path / "work"
    )
    with (
        pytest.raises(UsageError, match="stage 'static' must run first"),
        opened(settings, NullListener(), without=settings.slow_stages) as run,
    ):
        price_plans(run, [1])


def test_a_bundle_that_replaces_one_of_other_settings_says_what_differs(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    with opened(settings, NullListener()) as run:
        first = build_bundle(run)
        assert run.replaced == {}
    with opened(settings, NullListener()) as run:
        build_bundle(run)
        assert run.replaced == {}
    with opened(replace(settings, engines=2, baseline=True), NullListener()) as run:
        build_bundle(run)
        assert run.replaced == {"engines": 1, "dense graph": False}
    with opened(replace(settings, engines=2, baseline=True, seed=1), NullListener()) as run:
        build_bundle(run)
        assert first.reference is not None
        assert run.replaced["weights"] == first.reference.sha256
