"""The training loop, on one process or, under ``accelerate launch``, on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dyexport.backbones import get_adapter, get_conditioning
from dyexport.backbones.base import Preset
from dyexport.errors import DataError
from dyexport.flops import FlopsModel
from dyexport.models.devices import bf16_products
from dyexport.training.accelerating import check_accelerate
from dyexport.training.config import TrainConfig
from dyexport.training.data import LatentSource
from dyexport.training.ema import Ema
from dyexport.training.evaluation import Evaluation, Networks, StaticNetwork
from dyexport.training.losses import (
    Losses,
    NoisyBatch,
    StaticLosses,
    get_objective,
)
from dyexport.training.metrics import HistoryPoint, TrainResult, check_finite, mean_metrics
from dyexport.training.optimizers import new_optimizer, restored_moments, stored_moments
from dyexport.training.processes import agreed
from dyexport.training.randomness import NoisyBatches, Share
from dyexport.training.state import SavedState, load_state, run_digest, save_state
from dyexport.training.tracking import Monitoring, RunLog, opened_log

LOG_EVERY = 10  # steps; reading losses waits for the device

TrainingProgress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in total, and the latest metrics that were read."""

Config = TypeVar("Config", bound=TrainConfig)


def train_static(
    backbone: nn.Module,
    preset: Preset,
    source: LatentSource,
    config: TrainConfig,
    *,
    work_dir: Path,
    progress: TrainingProgress | None = None,
    monitoring: Monitoring | None = None,
) -> TrainResult:
    """Train a stock backbone in place: from scratch, or as the control of a dynamic model."""
    get_adapter(preset.backbone).share_embedders(backbone)
    run = Trainer(backbone, preset, source, config, work_dir=work_dir, progress=progress, monitoring=monitoring)
    return run.train()


class Trainer(Generic[Config]):
    """Trains ``model`` in place. A killed run of the same settings resumes; the result has averaged weights.

    A subclass overrides ``losses`` and ``total``, the loss that is minimized, ``begin_step``, and ``tensors`` and
    ``restore``, the state that a resumed run needs.
    """

    def __init__(
        self,
        model: nn.Module,
        preset: Preset,
        source: LatentSource,
        config: Config,
        *,
        work_dir: Path,
        progress: TrainingProgress | None = None,
        monitoring: Monitoring | None = None,
    ) -> None:
        check_accelerate(config.base_precision)
        self.accelerator = Accelerator()
        self.share = Share(index=self.accelerator.process_index, count=self.accelerator.num_processes)
        self.passes = config.passes(self.share.count)  # of a step
        self.accelerator.gradient_accumulation_steps = self.passes
        if len(source) == 0:
            raise DataError(f"{source.name} holds no samples; give at least one")
        self.model = model.eval()  # in train mode diffusers drops labels at random, which is all that differs
        self.adapter = get_adapter(preset.backbone)
        self.config = config
        self.progress = progress
        self.monitoring = monitoring
        self.path = work_dir / "training-state.safetensors"
        self.preset = preset
        self.batches = NoisyBatches(
            source=source,
            objective=get_objective(preset.objective),
            conditioning=get_conditioning(preset),
            dropout=config.label_dropout,
            batch_size=config.batch_size,
            seed=config.seed,
            share=self.share,
            device=self.accelerator.device,
        )
        self.flops = FlopsModel.of_preset(preset)
        if config.checkpointing:
            self.checkpoint_blocks()
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.module, self.optimizer = self.accelerator.prepare(self.loss_module(), self.new_optimizer())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = Ema(self.parameters, config.ema_decay)
        self.step = 0  # steps done
        self.history: list[HistoryPoint] = []
        self.log = RunLog()
        self._unread: list[Tensor] = []  # metrics of the latest steps, still on the device
        self._norms: list[Tensor] = []  # of their gradients

    @cached_property
    def run(self) -> str:
        """Hash of the model before its first step, the settings and the data."""
        source = self.batches.source
        return run_digest(self.config.digest(), self.preset.name, source.name, str(len(source)), model=self.model)

    def train(self) -> TrainResult:
        self.batches.source.check_finite()
        self.resume()
        kept = self.monitoring if self.accelerator.is_main_process else None
        with opened_log(kept, self.run, self.step, self.hyperparameters()) as self.log:
            self._report()
            self.log.evaluated = agreed(self.log.evaluated)
            self.evaluate()
            while self.step < self.config.steps:
                self.advance()
                self._report()
                self.checkpoint()
                self.evaluate()
        return self.finish()

    def advance(self) -> None:
        """Take one step: gradients of all micro-batches, then the optimizer."""
        self.begin_step()
        parts = []
        for share in self.shares():
            with self.accelerator.accumulate(self.module):
                losses = self.losses(self.batch(share), share)
                self.accelerator.backward(self.total(losses))
            parts.append(losses.detached())
        self.update()
        self.record(Losses.mean(parts))

    def shares(self) -> list[Share]:
        """Return this process's micro-batches, as shares of the batch."""
        return self.share.split(self.passes)

    def batch(self, share: Share) -> NoisyBatch:
        """Return a share of this step's batch."""
        return replace(self.batches, share=share).at(self.step)

    def begin_step(self) -> None:
        """Compute what the losses of all micro-batches depend on."""

    def checkpoint_blocks(self) -> None:
        cast(Any, self.model).enable_gradient_checkpointing()

    def loss_module(self) -> nn.Module:
        return StaticLosses(self.model, self.adapter, self.batches.objective)

    def new_optimizer(self) -> torch.optim.Optimizer:
        return new_optimizer(self.config.optimizer, self.model.parameters(), self.config.learning_rate)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Multiply in the precision of training: accelerate's, or bf16 for a base in lower precision."""
        with ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if self.config.base_precision != "fp32":
                stack.enter_context(bf16_products(self.accelerator.device, enabled=True))
            yield

    def losses(self, batch: NoisyBatch, share: Share) -> Losses:
        with self.products():
            losses: Losses = self.module(batch)
        return losses

    def total(self, losses: Losses) -> Tensor:
        return losses.diffusion

    def update(self) -> None:
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.grad_clip)
        self._norms.append(norm.detach())
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.config.rate_scale(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.step)
        self.step += 1

    def record(self, losses: Losses) -> None:
        """Keep the metrics on the device; they are read every ``LOG_EVERY`` steps, since reading synchronizes."""
        absent = torch.full_like(losses.diffusion, torch.nan)
        values = [absent if value is None else value for value in losses]
        self._unread.append(torch.stack(values).detach())  # (3,)
        if self.step % LOG_EVERY == 0 or self.step == self.config.steps:
            self._read_metrics()

    def _read_metrics(self) -> None:
        if not self._unread:
            return
        rows = self.accelerator.reduce(torch.stack(self._unread), "mean").tolist()  # S x 3
        norms = torch.stack(self._norms).tolist()  # S, of all processes together
        first = self.step - len(rows)
        self._unread.clear()
        self._norms.clear()
        points = [HistoryPoint(first + offset, *row) for offset, row in enumerate(rows)]
        self.history += points
        scaled = self.accelerator.scaler is not None  # which leaves out steps whose gradients overflow
        for point, norm in zip(points, norms, strict=True):
            check_finite(point, 0.0 if scaled else norm, self.config.learning_rate)
        values = {**self.metrics(points), "gradient_norm": sum(norms) / len(norms)}
        self.log.training(self.step, len(points) * self.config.batch_size, values)

    def metrics(self, points: Sequence[HistoryPoint]) -> dict[str, float]:
        """Return what is logged of the latest steps, by name."""
        return {**mean_metrics(points), "learning_rate": self.rates[0] * self.config.rate_scale(points[-1].step)}

    def hyperparameters(self) -> dict[str, Any]:
        """Return what is logged of the run as a whole."""
        trained = sum(value.numel() for value in self.parameters.values())
        sizes = {"samples": len(self.batches.source), "processes": self.share.count, "trained_parameters": trained}
        return {"model": self.preset.name, **sizes, **asdict(self.config)}

    def networks(self) -> Networks:
        """Return the networks that an evaluation runs."""
        return StaticNetwork(
            model=self.model, adapter=self.adapter, objective=self.batches.objective, products=self.products
        )

    @cached_property
    def evaluation(self) -> Evaluation | None:
        settings = None if self.monitoring is None else self.monitoring.evaluation
        per_pass = self.config.batch_size // (self.share.count * self.passes)
        return None if settings is None else Evaluation(self.batches, self.preset, settings, per_pass)

    def evaluate(self) -> None:
        """Evaluate the averaged weights, where this is due. All processes take part; nothing in training changes."""
        evaluation = self.evaluation
        if evaluation is None or not evaluation.due(self.step, self.config.steps, self.log.evaluated):
            return
        with self.log.paused(), self.ema.applied():
            networks = self.networks()
            values = evaluation.metrics(networks, partial(self.accelerator.reduce, reduction="sum"))
            picture = evaluation.picture(networks) if self.accelerator.is_main_process else None
            self.log.evaluation(self.step, values, picture)

    def _report(self) -> None:
        """Report every step, which may take minutes, with the latest metrics that were read."""
        if self.progress is not None and self.accelerator.is_main_process:
            self.progress(self.step, self.config.steps, self.history[-1].metrics() if self.history else {})

    def checkpoint(self) -> None:
        if self.step % self.config.checkpoint_every and self.step != self.config.steps:
            return
        self._read_metrics()
        with self.log.paused():
            if self.accelerator.is_main_process:
                self.log.sync()
                save_state(self.path, SavedState(self.step, self.tensors()), self.run)
            self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        if (state := load_state(self.path, self.run)) is not None:
            self.restore(state)

    def restore(self, state: SavedState) -> None:
        self.step = state.step
        self.history = [HistoryPoint(int(row[0]), *row[1:]) for row in state.tensors["history"].tolist()]
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state.tensors[f"model.{name}"])
            self.ema.averages[name].copy_(state.tensors[f"ema.{name}"])
            prefix = f"optimizer.{name}."
            names = [key for key in state.tensors if key.startswith(prefix)]
            moments = {key.removeprefix(prefix): state.tensors[key] for key in names}
            self.optimizer.state[parameter] = restored_moments(moments, parameter.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""
        tensors = {"history": torch.tensor(self.history, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter
            tensors[f"ema.{name}"] = self.ema.averages[name]
            moments = stored_moments(self.optimizer.state[parameter])
            tensors.update({f"optimizer.{name}.{key}": value for key, value in moments.items()})
        return tensors

    def finish(self) -> TrainResult:
        self.ema.apply()
        return TrainResult(steps=self.step, history=tuple(self.history), flops_ratio=None)
