"""Fine-tuning of a dynamic model under a FLOPs budget (arXiv 2410.03456 section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.backbones.base import Preset
from dyexport.models.dynamic import DynamicTransformer
from dyexport.training.config import FinetuneConfig
from dyexport.training.data import LatentSource
from dyexport.training.evaluation import DynamicNetworks, Networks
from dyexport.training.losses import DynamicLosses, Losses, NoisyBatch, flops_penalty, flops_ratio
from dyexport.training.metrics import HistoryPoint, TrainResult, of_budget
from dyexport.training.optimizers import new_optimizer
from dyexport.training.randomness import LogisticNoise, Share, step_generator
from dyexport.training.state import SavedState
from dyexport.training.teacher import Teacher
from dyexport.training.tracking import Monitoring
from dyexport.training.trainer import Trainer, TrainingProgress

MEASURED_SAMPLES = 512
TEACHER = "teacher."  # prefix of its weights in a saved state
ROUTERS = "routers."  # prefix of parameters


def finetune(
    model: DynamicTransformer,
    preset: Preset,
    source: LatentSource,
    config: FinetuneConfig,
    *,
    work_dir: Path,
    progress: TrainingProgress | None = None,
    monitoring: Monitoring | None = None,
) -> TrainResult:
    """Fine-tune a dynamic model in place until its FLOPs ratio meets the budget (arXiv 2410.03456 section 3.5)."""
    run = DynamicTrainer(model, preset, source, config, work_dir=work_dir, progress=progress, monitoring=monitoring)
    return run.train()


class DynamicTrainer(Trainer[FinetuneConfig]):
    """Trainer of a ``DynamicTransformer``: diffusion loss, loss of the dense model and FLOPs penalty."""

    model: DynamicTransformer
    teacher: Teacher | None = None  # with ``distill``, once the dense model is no longer trained
    overall: Tensor | None = None  # FLOPs ratio of the batch; None: one pass sees all of this process's share

    def loss_module(self) -> nn.Module:
        return DynamicLosses(self.model, self.batches.objective, self.flops, distill=self.config.distill)

    def new_optimizer(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": self.model.trainable},
            {"params": self.model.routers.parameters(), "lr": self.config.router_learning_rate},
        ]
        return new_optimizer(self.config.optimizer, groups, self.config.learning_rate)

    def checkpoint_blocks(self) -> None:
        self.model.checkpoint_blocks()

    def begin_step(self) -> None:
        """Choose the step's budget, and measure the FLOPs ratio of the whole batch where no pass sees all of it."""
        if self.config.budgets:
            self.model.budget = self.config.budget_at(self.step)
        self.overall = self.ratio_of_batch() if self.passes > 1 else None

    @torch.no_grad()
    def ratio_of_batch(self) -> Tensor:
        """Return the mean ratio over all micro-batches and processes, under the gate noise of this step: ()."""
        ratios = []
        for share in self.shares():
            with self.products():
                output = self.model(self.batch(share).inputs, noise=self.gate_noise(share))
            ratios.append(flops_ratio(output, self.flops).mean())
        overall: Tensor = self.accelerator.reduce(torch.stack(ratios).mean(), "mean")
        return overall

    def gate_noise(self, share: Share) -> LogisticNoise:
        """Return this step's gate noise, which is the same however the batch is divided."""
        generator = step_generator(self.config.seed, self.step, "gates", self.accelerator.device)
        return LogisticNoise(generator, share, self.config.noise_scale(self.step))

    def losses(self, batch: NoisyBatch, share: Share) -> Losses:
        complete = self.step < self.config.complete_steps
        if self.config.distill and not complete and self.teacher is None:
            self.teacher = Teacher(self.model, self._averages())
        noise = self.gate_noise(share)
        with self.products():
            losses: Losses = self.module(batch, noise, complete=complete, teacher=self.teacher)
        return losses

    def total(self, losses: Losses) -> Tensor:
        assert losses.flops_ratio is not None
        overall = self.overall
        if overall is None:
            overall = self.accelerator.reduce(losses.flops_ratio.detach(), "mean")
        total = losses.diffusion + flops_penalty(losses.flops_ratio, overall, self.config.target(self.step))
        return total if losses.complete is None else total + losses.complete

    def metrics(self, points: Sequence[HistoryPoint]) -> dict[str, float]:
        """Return the metrics of any trainer, and FLOPs ratio and target of each of several budgets."""
        config, metrics = self.config, super().metrics(points)
        scale = config.rate_scale(points[-1].step)
        metrics["router_learning_rate"] = self.rates[1] * scale
        if not config.budgets:
            return {**metrics, "target": config.target(points[-1].step)}
        del metrics["flops_ratio"]
        for point in points:  # the latest of each budget
            budget = config.budget_at(point.step)
            metrics[of_budget("flops_ratio", budget)] = point.flops_ratio
            metrics[of_budget("target", budget)] = config.target(point.step)
        return metrics

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "router_learning_rate": self.config.router_learning_rate}

    def networks(self) -> Networks:
        return DynamicNetworks(
            model=self.model,
            objective=self.batches.objective,
            flops=self.flops,
            products=self.products,
            complete=0 < self.config.complete_steps >= self.step,
        )

    def restore(self, state: SavedState) -> None:
        super().restore(state)
        if any(name.startswith(TEACHER) for name in state.tensors):
            self.teacher = Teacher(self.model, self._averages())
            for name, value in self.teacher.weights.items():
                value.copy_(state.tensors[f"{TEACHER}{name}"])

    def _averages(self) -> dict[str, Tensor]:
        """Return the averages of what the dense model reads: all but the routers of widths and tokens."""
        return {name: value.clone() for name, value in self.ema.averages.items() if not name.startswith(ROUTERS)}

    def tensors(self) -> dict[str, Tensor]:
        frozen = {} if self.teacher is None else self.teacher.weights
        return {**super().tensors(), **{f"{TEACHER}{name}": value for name, value in frozen.items()}}

    def finish(self) -> TrainResult:
        return replace(super().finish(), flops_ratio=self.measured_ratio())

    @torch.no_grad()
    def measured_ratio(self) -> float:
        """Measure lambda under hard gates, on noisy batches that training has not used: the mean over ``budgets``."""
        global_batches = replace(self.batches, share=Share())
        count = math.ceil(MEASURED_SAMPLES / self.config.batch_size)
        ratios = []
        for budget in self.config.budgets or (None,):
            self.model.budget = budget
            for step in range(self.config.steps, self.config.steps + count):
                with self.products():
                    output = self.model(global_batches.at(step).inputs)
                ratios.append(flops_ratio(output, self.flops).mean())
        return float(torch.stack(ratios).mean())
