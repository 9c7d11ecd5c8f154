"""Engines that are added to a bundle of several budgets: each has its own, and the dense network has one for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.bundle.manifest import DENSE
from dyexport.bundle.plan_info import INFO, PlanInfo
from dyexport.bundle.reader import Bundle
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.models.inputs import NoisedInputs
from dyexport.runtime.loading import load
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.compilation.bundles import ADA, RTX, compile_for, copy_of, everything_in
from tests.pipeline.tiny import TINY, build, redone, tiny_settings

BUDGETS = (0.5, 0.3)
BLACKWELL = TensorrtSettings(compute_capabilities=("12.0",))
NETWORKS = {"segment-00", "conditioning", "dense"}

pytestmark = pytest.mark.slow


def infos(root: Path) -> dict[tuple[float, str], PlanInfo]:
    """Descriptions of the plans at each budget, without the hashes of the plans."""
    return {
        (budget, name): PlanInfo.read(path.with_name(INFO)).model_copy(update={"plan_sha256": ""})
        for budget in BUDGETS
        for name, path in Bundle.open(root, budget=budget).engine_paths(RTX).items()
    }


@pytest.mark.tensorrt
def test_compile_makes_the_plans_that_a_build_makes_for_every_budget(rtx: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, budgets=BUDGETS, baseline=True, token_path="dynamic")
    plain = build(settings)
    root = copy_of(plain, tmp_path / "machine")
    before = {budget: Bundle.open(root, budget=budget).root for budget in BUDGETS}

    (result,) = compile_for(root)

    assert result.up_to_date == ()
    assert set(result.seconds) == {f"{name}@0.5" for name in NETWORKS} | {"segment-00@0.3", "conditioning@0.3"}
    first, second = (Bundle.open(root, budget=budget) for budget in BUDGETS)
    assert set(first.engine_paths(RTX)) == set(second.engine_paths(RTX)) == NETWORKS
    assert first.engine_paths(RTX)[DENSE] == second.engine_paths(RTX)[DENSE]
    assert first.engine_paths(RTX)["segment-00"].read_bytes() != second.engine_paths(RTX)["segment-00"].read_bytes()
    plans = {*first.engine_paths(RTX).values(), *second.engine_paths(RTX).values()}
    assert result.bytes == sum(plan.stat().st_size for plan in plans)
    assert not before[0.3].exists()  # its manifest has moved to a new folder
    assert set(everything_in(root)) == {*first.manifest.files, "manifest.json"}
    for budget in BUDGETS:
        assert verify_bundle(Bundle.open(root, budget=budget).root, VerifySettings(), golden_only=True).passed

    (again,) = compile_for(second.root)  # a budget's folder stands for the whole bundle
    assert again.seconds == {}
    assert len(again.up_to_date) == 5

    (other,) = compile_for(root, tensorrt=BLACKWELL)
    assert set(other.seconds) == set(result.seconds)
    assert set(everything_in(root)) == {*Bundle.open(root).manifest.files, "manifest.json"}


@pytest.mark.tensorrt
def test_a_build_keeps_compiled_plans_of_every_budget_and_makes_the_same(rtx: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, budgets=BUDGETS, baseline=True, token_path="dynamic")
    root = build(settings).root
    compile_for(root)
    compiled = infos(root)

    redone(settings)
    assert infos(root) == compiled
    assert redone(settings) == set()
    assert set(everything_in(root)) == {*Bundle.open(root).manifest.files, "manifest.json"}

    with_plans = replace(settings, targets=("onnx", RTX), tensorrt=ADA)
    build(with_plans)
    assert infos(root) == compiled
    assert redone(with_plans) == set()


@pytest.mark.tensorrt
def test_a_budget_without_the_dense_network(rtx: Any, tmp_path: Path) -> None:
    root = build(tiny_settings(tmp_path, budgets=BUDGETS, token_path="dynamic")).root
    compile_for(root)
    for budget in BUDGETS:
        assert set(Bundle.open(root, budget=budget).engine_paths(RTX)) == {"segment-00", "conditioning"}


@pytest.mark.aot_inductor
def test_packages_of_every_budget_compute_what_its_graphs_do(tmp_path: Path) -> None:
    root = build(tiny_settings(tmp_path, budgets=BUDGETS)).root
    (result,) = compile_for(root, "torch", tensorrt=TensorrtSettings())
    assert set(result.seconds) == {
        f"{name}@{budget:g}" for budget in BUDGETS for name in ("segment-00", "conditioning")
    }
    inputs = NoisedInputs(preset=TINY, batch_size=2).at(0.4)
    transformer, graphs = load(root, target="torch"), load(root)
    for budget in BUDGETS:
        transformer.budget = graphs.budget = budget
        sample, other = (each(**inputs, return_dict=False)[0] for each in (transformer, graphs))
        torch.testing.assert_close(sample, other, rtol=1e-4, atol=1e-4)
