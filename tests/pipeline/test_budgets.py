"""Bundles of several budgets: one model, a plan for each, shared weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dyexport
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.doctor.bundles import fit_bundle
from dyexport.doctor.probing import Findings
from dyexport.doctor.targets import judge_all
from dyexport.errors import BudgetError, BundleError, TargetError, UsageError
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline.build import finetune_model, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.samples import sample
from dyexport.serving.config import ServedModelConfig
from dyexport.serving.samplers import open_sampler, to_bytes
from dyexport.serving.triton_repository import Deployment, deploy
from dyexport.stages.ledger import NullListener
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.doctor.machines import machine
from tests.pipeline.tiny import TINY, build, hashes, redone, tiny_settings

BUDGETS = (0.5, 0.3)

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    return tiny_settings(tmp_path_factory.mktemp("budgets"), budgets=BUDGETS, router="ordered", baseline=True)


@pytest.fixture(scope="module")
def bundle(settings: BuildSettings) -> Bundle:
    return build(settings)


def test_the_first_budget_is_the_default_and_all_are_listed(bundle: Bundle) -> None:
    assert bundle.manifest.budget == 0.5
    assert bundle.budgets == (0.3, 0.5)
    for budget in BUDGETS:
        opened = Bundle.open(bundle.root, budget=budget)
        assert opened.manifest.budget == budget
        assert opened.manifest.plan.flops_ratio == pytest.approx(budget, abs=0.01)
        assert opened.budgets == bundle.budgets


def test_a_copy_without_a_budget_is_damaged(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(bundle.root, root, ignore=shutil.ignore_patterns("budgets"))
    with pytest.raises(BundleError, match=r"budgets/0\.3/manifest\.json is missing; copy the bundle again"):
        Bundle.open(root, budget=0.3)


def test_engines_of_every_budget_are_compiled_by_one_command(bundle: Bundle) -> None:
    with pytest.raises(TargetError, match=f"run: dyexport compile {bundle.root} --target torch"):
        Bundle.open(bundle.root, budget=0.3).engine_paths("torch")


def test_doctor_counts_the_engines_of_every_budget(bundle: Bundle, tmp_path: Path) -> None:
    here = machine(tmp_path / "no-files")
    fits = fit_bundle(bundle, bundle.root, judge_all(here), here, Findings())
    onnx = next(fit for fit in fits if fit.target == "onnx")
    paths = {path for each in bundle.at_each_budget() for path in each.engine_paths("onnx").values()}
    assert onnx.engines == onnx.fitting == len(paths) > len(bundle.engine_paths("onnx"))


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_equals_its_masked_model(bundle: Bundle, budget: float) -> None:
    root = Bundle.open(bundle.root, budget=budget).root
    report = verify_bundle(root, VerifySettings(timesteps=8))
    assert report.passed
    assert report.max_abs_error < 1e-4
    assert verify_bundle(root, VerifySettings(), golden_only=True).passed


@pytest.mark.parametrize("form", [{"widths": "static"}, {"quantize": "int8"}], ids=["static", "int8"])
def test_every_budget_of_other_forms_equals_its_masked_model(form: dict[str, Any], tmp_path: Path) -> None:
    built = build(tiny_settings(tmp_path, budgets=BUDGETS, **form))
    for budget in BUDGETS:
        opened = Bundle.open(built.root, budget=budget)
        assert opened.manifest.plan.flops_ratio == pytest.approx(budget, abs=0.02)
        assert opened.manifest.plan.is_static == ("widths" in form)
        assert verify_bundle(opened.root, VerifySettings(timesteps=4)).passed


def test_a_transformer_switches_between_budgets(bundle: Bundle) -> None:
    transformer = dyexport.load(bundle.root)
    assert transformer.budget == 0.5
    assert transformer.budgets == (0.3, 0.5)
    inputs = NoisedInputs(preset=TINY, batch_size=2).at(0.4)
    outputs = {}
    for budget in (0.5, 0.3, 0.5):
        transformer.budget = budget
        sample = transformer(**inputs, return_dict=False)[0]
        if budget in outputs:
            torch.testing.assert_close(sample, outputs[budget], rtol=0, atol=0)
        outputs[budget] = sample
        alone = dyexport.load(bundle.root, budget=budget)
        assert alone.budget == budget
        torch.testing.assert_close(alone(**inputs, return_dict=False)[0], sample, rtol=0, atol=0)
        reference, _ = load_dynamic((alone._bundle.root / alone._bundle.manifest.reference.path).resolve())
        torch.testing.assert_close(reference(inputs).sample, sample, rtol=1e-4, atol=1e-4)
    assert not torch.equal(outputs[0.3], outputs[0.5])
    transformer.close()
    torch.testing.assert_close(transformer(**inputs, return_dict=False)[0], outputs[0.5], rtol=0, atol=0)


def test_a_limited_transformer_frees_the_earlier_budget(bundle: Bundle) -> None:
    transformer = dyexport.load(bundle.root, max_resident=1)
    transformer.budget = 0.3
    assert not transformer._others


def test_a_budget_that_is_not_there_is_refused(bundle: Bundle) -> None:
    transformer = dyexport.load(bundle.root)
    with pytest.raises(UsageError, match=r"budget is 0\.4; .* has 0\.3, 0\.5; give one of these"):
        transformer.budget = 0.4
    assert transformer.budget == 0.5
    with pytest.raises(UsageError, match=r"budget is 0\.4"):
        dyexport.load(bundle.root, budget=0.4)
    with pytest.raises(UsageError, match="budget is 2"):
        dyexport.load(bundle.root, budget=2)


def test_budgets_of_ordered_routers_share_their_weights(bundle: Bundle) -> None:
    assert bundle.manifest.files["graphs/weights.bin"].bytes < 1.3 * bundle.manifest.plan.disk_bytes


def test_every_budget_has_the_same_dense_network(bundle: Bundle) -> None:
    inputs = NoisedInputs(preset=TINY, batch_size=2).at(0.4)
    samples = [dyexport.load(bundle.root, budget=budget, dense=True)(**inputs)[0] for budget in BUDGETS]
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0)


def test_a_damaged_budget_is_noticed_by_the_whole_bundle(bundle: Bundle, tmp_path: Path) -> None:
    other = dyexport.load(bundle.root, budget=0.3)
    other.save_pretrained(tmp_path / "copy")
    assert Bundle.open(tmp_path / "copy", budget=0.5).manifest.budget == 0.5
    table = tmp_path / "copy" / "budgets" / "0.3" / "calibration" / "widths.safetensors"
    table.write_bytes(table.read_bytes()[:-1])
    for root in (tmp_path / "copy", tmp_path / "copy" / "budgets" / "0.3"):
        with pytest.raises(BundleError, match=r"widths\.safetensors"):
            Bundle.open(root)


def test_a_server_takes_the_budget_of_a_request(bundle: Bundle, tmp_path: Path) -> None:
    model = deploy(Deployment(bundle=bundle.root, repository=tmp_path, name="tiny"))
    assert 'name: "budget" data_type: TYPE_FP32' in (model / "config.pbtxt").read_text()
    sampler = open_sampler(model / "1", ServedModelConfig(), "cpu")
    label, seed = np.array([[3]]), np.array([[7]])
    samples = {}
    for budget in BUDGETS:
        request = sampler.parser.parse({"label": label, "seed": seed, "budget": np.array([[budget]], np.float32)})
        samples[budget] = sampler.sample([request], lambda: None)
        alone = sample(dyexport.load(bundle.root, budget=budget), labels=[3], seed=7)
        np.testing.assert_array_equal(samples[budget], to_bytes(alone.values))
    assert not np.array_equal(samples[0.3], samples[0.5])
    with pytest.raises(UsageError, match="is one budget of"):
        deploy(Deployment(bundle=bundle.root / "budgets" / "0.3", repository=tmp_path, name="other"))


def test_the_same_build_again_makes_nothing(settings: BuildSettings, bundle: Bundle) -> None:
    before = hashes(bundle.root)
    assert redone(settings) == set()
    assert hashes(bundle.root) == before


@pytest.mark.parametrize("router", ["free", "ordered"])
def test_one_model_is_trained_for_all_budgets(router: str, tmp_path: Path) -> None:
    training = {"random_weights": False, "train_steps": 2, "finetune_steps": 4}
    settings = tiny_settings(tmp_path, budgets=BUDGETS, router=router, **training)
    with opened(settings, NullListener()) as run:
        trained, _ = load_dynamic(finetune_model(run).dynamic.path)
    assert trained.budgets == (0.3, 0.5)
    offsets = trained.block_routers[0].offsets
    assert offsets is not None
    assert offsets.tokens is not None
    assert offsets.heads.detach().abs().amax(dim=1).min() > 0, "no step trained one of the budgets"
    for name, value in offsets.named_parameters():
        assert not torch.equal(value[0], value[1]), name


def test_budgets_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="several budgets share the weights of one model"):
        tiny_settings(tmp_path, budgets=(0.5, 0.3), finetune_steps=0)
    with pytest.raises(BudgetError, match="is none of"):
        tiny_settings(tmp_path, budgets=(0.4, 0.3))
    with pytest.raises(BudgetError, match="two or more, each once"):
        tiny_settings(tmp_path, budgets=(0.5, 0.5))
