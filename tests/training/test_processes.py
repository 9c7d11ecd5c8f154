"""One process and two train the same model, in one pass or in several, resume to the same bits, and sample the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyexport.stages.ledger import ProcessGroup
from dyexport.training.config import FinetuneConfig
from dyexport.training.evaluation import EvaluationSettings
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.processes import find_process_group
from dyexport.training.synthetic import SHARD_SAMPLES, generate
from dyexport.training.synthetic_config import SyntheticConfig
from dyexport.training.tracking import METRICS, Monitoring
from tests.training.helpers import SIT, Pixels, Stopped, backbone, blobs, dynamic, same, stop, weights

ROOT = Path(__file__).parents[2]
Weights = dict[str, torch.Tensor]


CONFIG = FinetuneConfig(steps=8, batch_size=8, complete=0.5, warmup=0.5, learning_rate=1e-3, checkpoint_every=3)
SHARDS = 3
SAMPLES = SyntheticConfig(samples=(SHARDS - 1) * SHARD_SAMPLES + 2, steps=2)


def sample(directory: Path, group: ProcessGroup | None = None) -> int:
    """Sample data into a directory, and return the number of denoising steps that this process made."""
    reports: list[int] = []
    directory.mkdir(exist_ok=True)
    generate(backbone(SIT), SIT, SAMPLES, directory, lambda done, *_: reports.append(done), group=group)
    return reports[-1]


def run(
    work_dir: Path, micro_batch: int | None = None, until: int | None = None, monitoring: Monitoring | None = None
) -> tuple[list[list[float]], Weights]:
    """Loss and ratio of every step; noisy gates, so that noise must be shared out too.

    Raises ``Stopped`` in every process after step ``until``.
    """
    model = dynamic(SIT)
    for router in model.routers:
        router.shift(-14.0, tokens=True)
    config = replace(CONFIG, micro_batch=micro_batch, checkpointing=True)
    trainer = DynamicTrainer(model, SIT, blobs(SIT), config, work_dir=work_dir, monitoring=monitoring)
    if until is not None:
        stop(trainer, until)
    result = trainer.train()
    return [[point.diffusion, point.flops_ratio] for point in result.history], weights(model)


def evaluated(directory: Path, expected: Weights) -> None:
    """Run with evaluations, stopped and resumed where one is due: the weights are those without."""
    settings = EvaluationSettings(every=3, source=None, decoder=Pixels())
    monitoring = Monitoring(directory=directory / "curves", evaluation=settings)
    with pytest.raises(Stopped):
        run(directory / "evaluated", micro_batch=2, until=6, monitoring=monitoring)
    _, found = run(directory / "evaluated", micro_batch=2, monitoring=monitoring)
    assert same(found, expected)


def evaluations(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "curves" / METRICS).read_text().splitlines()]
    return [line for line in lines if "evaluation/diffusion" in line]


def runs(directory: Path) -> dict[str, list[list[float]]]:
    """Run with a whole share a pass, and in micro-batches, once undisturbed and once stopped and resumed."""
    whole, _ = run(directory / "whole")
    divided, expected = run(directory / "divided", micro_batch=2)
    with pytest.raises(Stopped):
        run(directory / "stopped", micro_batch=2, until=5)
    resumed, found = run(directory / "stopped", micro_batch=2)
    assert same(found, expected)
    assert resumed == divided
    evaluated(directory, expected)
    return {"whole": whole, "divided": divided}


@pytest.mark.build
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    # On CPUs accelerate starts several processes only by the launcher it has for several GPUs.
    options = ["--num_processes=2", "--num_machines=1", "--main_process_port=0"]
    options += ["--mixed_precision=no", "--dynamo_backend=no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = ["-m", "tests.training.test_processes", str(tmp_path)]
    subprocess.run([*launch, *script], cwd=ROOT, env=environment, check=True, timeout=300)
    alone, _ = run(tmp_path / "alone")
    evaluated(tmp_path / "one", run(tmp_path / "divided-alone", micro_batch=2)[1])
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for together in found["trained"].values():
            for left, right in zip(together, alone, strict=True):
                assert left == pytest.approx(right, abs=1e-5)
        assert found["sampled"] == 2 * (2, 1)[rank]
    assert sample(tmp_path / "sampled-alone") == 2 * SHARDS
    expected = {path.name: path.read_bytes() for path in (tmp_path / "sampled-alone").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "sampled-together").iterdir()} == expected
    assert len(expected) == SHARDS
    together, alone_too = (evaluations(tmp_path / name) for name in ("", "one"))
    assert [line["step"] for line in together] == [0, 3, 6, 8]
    for left, right in zip(together, alone_too, strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    assert any(0.1 < ratio < 0.99 for _, ratio in alone)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    result = {"sampled": sample(directory / "sampled-together", find_process_group()), "trained": runs(directory)}
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
