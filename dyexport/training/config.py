"""Settings of training runs, with the published defaults (arXiv 2410.03456, appendix A) where there are any."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import numpy as np

from dyexport.backbones.recipe import BasePrecision, Optimizer
from dyexport.errors import BudgetError, UsageError
from dyexport.models.routers import WIDTH_BIAS

GOLDEN_SECTION = (math.sqrt(5) - 1) / 2
WITHOUT_EFFECT = ("checkpoint_every", "checkpointing", "micro_batch")  # on the trained weights, apart from rounding
ADDED = {
    "budgets": (),
    "optimizer": "adamw",
    "base_precision": "fp32",
}  # hashed where they differ, so that older states stay valid


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Diffusion training of a static backbone; ``batch_size`` is global, over all processes.

    checkpointing   recompute blocks in the backward pass
    micro_batch     samples of one pass of a process, which accumulates gradients; None: its whole share of a batch
    base_precision  storage of weights that are not trained
    """

    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-4
    lr_decay: float = 0.0  # share of the run, at its end, over which the learning rate falls linearly to zero
    ema_decay: float = 0.9999
    grad_clip: float = 1.0
    label_dropout: float = 0.1  # share of labels replaced by the null class, for classifier-free guidance
    seed: int = 0
    checkpoint_every: int = 500
    checkpointing: bool = False
    micro_batch: int | None = None
    optimizer: Optimizer = "adamw"
    base_precision: BasePrecision = "fp32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "grad_clip", "checkpoint_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(0 <= self.lr_decay <= 1, "lr_decay", self.lr_decay, "in [0, 1], a share of the run")
        _require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "in [0, 1)")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.micro_batch is not None:
            _require(self.micro_batch > 0, "micro_batch", self.micro_batch, "above 0")

    def rate_scale(self, step: int) -> float:
        """Return the factor of the learning rates at a step."""
        return min((self.steps - step) / max(self.lr_decay * self.steps, 1), 1.0)

    def passes(self, processes: int) -> int:
        """Return the number of passes that a process makes for its share of a batch. Raises ``UsageError``."""
        if self.batch_size % processes:
            raise UsageError(
                f"batch_size {self.batch_size} does not divide by {processes} processes; use a multiple of it"
            )
        share = self.batch_size // processes
        if share % (self.micro_batch or share):
            raise UsageError(
                f"a process has {share} samples of a batch, which micro-batches of {self.micro_batch} do not divide; "
                f"use a divisor of {share}"
            )
        return share // (self.micro_batch or share)

    def digest(self) -> str:
        """Hash every setting that affects the trained weights."""
        values = {name: value for name, value in asdict(self).items() if name not in WITHOUT_EFFECT}
        values = {name: value for name, value in values.items() if name not in ADDED or value != ADDED[name]}
        return hashlib.sha256(json.dumps([type(self).__name__, values], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """DyDiT fine-tuning: the FLOPs ratio (lambda) falls from 1 to ``budget``.

    budgets   two or more, ascending, that the model is trained for in place of ``budget``: one at each step
    warmup    share of the run, at its start, over which lambda falls
    complete  share of the run, at its start, that trains the dense model too
    anneal    share of the run over which gate noise falls to zero; it ends where ``settle`` begins
    settle    share of the run, at its end, in which the gates are those that will run
    distill   train the dense model until the gates settle, and the dynamic path on its predictions; after that train
              the dynamic path on the data and on a frozen copy of the dense model. Not in the paper. It doubles the
              forward passes, and pays off in runs of thousands of steps.
    """

    budget: float = 0.5
    budgets: tuple[float, ...] = ()
    warmup: float = 0.2
    complete: float = 0.2
    distill: bool = False
    anneal: float = 0.4
    settle: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        for budget in self.budgets or (self.budget,):
            if not 0 < budget <= 1:
                raise BudgetError(f"budget is {budget!r}; give a FLOPs ratio above 0 and at most 1, such as 0.5")
        for name in ("warmup", "complete", "anneal", "settle"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1], a share of the run")

    def budget_at(self, step: int) -> float:
        """Return the budget that a step trains for.

        Several have shares of the steps that are inverse to them, since small ones need more training, and are spread
        evenly over the run: step s takes that at the fraction of s + 1/2 times the golden section.
        """
        if not self.budgets:
            return self.budget
        ends = np.cumsum([1 / budget for budget in self.budgets])
        place = (step + 0.5) * GOLDEN_SECTION % 1 * ends[-1]
        return self.budgets[min(int(np.searchsorted(ends, place, side="right")), len(self.budgets) - 1)]

    def target(self, step: int) -> float:
        """Return lambda at a step: 1 at the start, the step's budget after the warm-up."""
        progress = min(step / max(self.warmup * self.steps, 1), 1.0)
        return 1.0 + progress * (self.budget_at(step) - 1.0)

    def noise_scale(self, step: int) -> float:
        """Return the scale of gate noise at a step: 1, falling to 0 where the gates settle."""
        remaining = ((1 - self.settle) * self.steps - 1 - step) / max(self.anneal * self.steps, 1)
        return min(max(remaining, 0.0), 1.0)

    @property
    def complete_steps(self) -> int:
        """Steps that train the dense model too."""
        return round((1 - self.settle if self.distill else self.complete) * self.steps)

    @property
    def router_learning_rate(self) -> float:
        """Learning rate at which a gate can move from its initial logit to zero and back while lambda falls.

        At 1e-4 Adam moves a router's bias of +15 by 15 in 150,000 steps, the published length. In a run of a thousand
        steps no gate would close.
        """
        return max(self.learning_rate, 2 * WIDTH_BIAS / max(self.warmup * self.steps, 1))


def _require(holds: bool, name: str, value: float, must_be: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}; it must be {must_be}")
