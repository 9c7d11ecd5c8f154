"""The same command under ``accelerate launch``: all processes train, one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.pipeline.build import finetune_model, opened
from dyexport.stages.ledger import NullListener
from tests.pipeline.tiny import tiny_settings

ROOT = Path(__file__).parents[2]


def test_two_processes_finetune_as_one_does(tmp_path: Path) -> None:
    # On CPUs accelerate starts several processes only by the launcher it has for several GPUs.
    options = ["--num_processes=2", "--num_machines=1", "--main_process_port=0", "--mixed_precision=no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--dynamo_backend=no", *options]
    command = ["finetune", "--model=sit-tiny", "--budget=0.5", "--finetune-steps=3", "--json"]
    places = ["--work", str(tmp_path / "two" / "work")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "dyexport", *command, *places],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("recipe") == 1, "the other process is silent"
    together, _ = load_dynamic(Path(json.loads(done.stdout)["checkpoint"]))

    alone = tiny_settings(tmp_path / "one", random_weights=False, train_steps=3, finetune_steps=3)
    with opened(alone, NullListener()) as run:
        model, _ = load_dynamic(finetune_model(run).dynamic.path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)
