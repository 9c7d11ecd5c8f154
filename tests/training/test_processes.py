"""One process and two must train the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyexport.training.config import FinetuneConfig
from dyexport.training.finetuning import finetune
from tests.training.helpers import SIT, blobs, dynamic

ROOT = Path(__file__).parents[2]


def run(work_dir: Path) -> list[list[float]]:
    """Loss and ratio of every step; noisy gates, so that noise must be shared out too."""
    model = dynamic(SIT)
    for router in model.routers:
        router.shift(-14.0, tokens=True)
    config = FinetuneConfig(steps=8, batch_size=8, complete=0.5, warmup=0.5, learning_rate=1e-3)
    result = finetune(model, SIT, blobs(SIT), config, work_dir=work_dir)
    return [[point.diffusion, point.flops_ratio] for point in result.history]


@pytest.mark.build
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    # On CPUs accelerate starts several processes only by the launcher it has for several GPUs.
    options = ["--num_processes=2", "--num_machines=1", "--main_process_port=0"]
    options += ["--mixed_precision=no", "--dynamo_backend=no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = ["-m", "tests.training.test_processes", str(tmp_path)]
    subprocess.run([*launch, *script], cwd=ROOT, env=environment, check=True, timeout=300)
    alone = run(tmp_path / "alone")
    for rank in range(2):
        together = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for left, right in zip(together, alone, strict=True):
            assert left == pytest.approx(right, abs=1e-5)
    assert any(0.1 < ratio < 0.99 for _, ratio in alone)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(run(directory / "together")))
    torch.distributed.destroy_process_group()
