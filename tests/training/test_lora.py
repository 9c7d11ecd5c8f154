"""Training by TD-LoRA: the backbone stays, what is trained is small, and a killed run ends as if it had not been."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dyexport.lora import LoraSpec
from dyexport.training.config import FinetuneConfig
from dyexport.training.finetuning import DynamicTrainer
from tests.training.helpers import SIT, blobs, dynamic

ROOT = Path(__file__).parents[2]
CONFIG = FinetuneConfig(steps=20, batch_size=8, checkpoint_every=5, seed=3, learning_rate=1e-2)


SPEC = LoraSpec(rank=2, experts=3, alpha=2)


def trainer(work_dir: Path, config: FinetuneConfig = CONFIG, spec: LoraSpec = SPEC) -> DynamicTrainer:
    model = dynamic(SIT, td_lora=spec)
    return DynamicTrainer(model, SIT, blobs(SIT), config, work_dir=work_dir)


def trained(run: DynamicTrainer) -> dict[str, torch.Tensor]:
    run.train()
    return run.model.state_dict()


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_routers_and_updates_move_and_of_the_backbone_only_biases_do(tmp_path: Path, distill: bool, bias: str) -> None:
    spec = LoraSpec.model_validate({**SPEC.model_dump(), "bias": bias})
    run = trainer(tmp_path, replace(CONFIG, distill=distill), spec)
    before = copy.deepcopy(run.model.state_dict())
    moved = {name for name, value in trained(run).items() if not torch.equal(value, before[name])}
    expected = {name for name in before if name.startswith(("routers.", "td_lora."))}
    if bias == "all":
        expected |= {name for name in before if name.startswith("backbone.") and name.endswith(".bias")}
    assert moved == expected


@pytest.mark.build
def test_the_updates_learn_the_complete_model(tmp_path: Path) -> None:
    """With every gate open they are all that can lower the complete model's loss."""
    config = replace(CONFIG, steps=150, budget=1.0, complete=1.0, learning_rate=3e-2)
    history = trainer(tmp_path, config).train().history
    losses = [point.complete for point in history]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_state_holds_what_is_trained_and_no_more(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(CONFIG, steps=5))
    run.train()
    with safe_open(run.path, framework="pt") as state:
        names = {name.removeprefix("model.") for name in state.keys() if name.startswith("model.")}  # noqa: SIM118
        assert not [name for name in state.keys() if ".backbone." in name]  # noqa: SIM118
    assert names == set(run.parameters)
    assert all(name.startswith(("routers.", "td_lora.")) for name in names)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_lora import trainer
run = trainer(Path(sys.argv[1]))
total = run.total
def kill(losses):
    if run.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return total(losses)
run.total = kill
run.train()
"""


@pytest.mark.build
def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=ROOT, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    resumed = trainer(tmp_path / "killed")
    resumed.resume()
    assert resumed.step == 10
    found, expected = trained(trainer(tmp_path / "killed")), trained(trainer(tmp_path / "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
