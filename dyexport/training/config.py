"""How a run trains. Defaults are the published ones (arXiv 2410.03456, appendix A) unless a comment says otherwise."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from dyexport.errors import BudgetError, UsageError
from dyexport.models.gates import WIDTH_BIAS


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Plain diffusion training, of a static backbone; ``batch_size`` is global, over all processes."""

    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-4
    lr_decay: float = 0.0  # share of the run, at its end, over which the learning rate falls linearly to zero
    ema_decay: float = 0.9999
    grad_clip: float = 1.0
    label_dropout: float = 0.1  # share of labels replaced by the null class, for classifier-free guidance
    seed: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "grad_clip", "checkpoint_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(0 <= self.lr_decay <= 1, "lr_decay", self.lr_decay, "in [0, 1], a share of the run")
        _require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "in [0, 1)")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")

    def rate_scale(self, step: int) -> float:
        """What learning rates are multiplied by at a step."""
        return min((self.steps - step) / max(self.lr_decay * self.steps, 1), 1.0)

    def digest(self) -> str:
        """Identifies everything here that decides the weights trained."""
        values = {name: value for name, value in asdict(self).items() if name != "checkpoint_every"}
        return hashlib.sha256(json.dumps([type(self).__name__, values], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """DyDiT fine-tuning: the FLOPs ratio (lambda) falls from 1 to ``budget``.

    ``warmup``, ``complete``, ``anneal`` and ``settle`` are shares of the run: over the first ``warmup`` of it
    lambda falls, for the first ``complete`` the complete model is trained too, and over ``anneal``, which ends
    where the last ``settle`` begins, gate noise fades to zero, so that the network still has time to learn with
    the gates that will run.
    With ``distill`` the complete model is trained until the gates settle and the dynamic path learns its
    predictions; from then on all weights are the dynamic path's, which learns from the data and from what the
    complete model was. Not in the paper, and twice the forward passes, but worth it in runs of thousands of steps.
    """

    budget: float = 0.5
    warmup: float = 0.2
    complete: float = 0.2
    distill: bool = False
    anneal: float = 0.4
    settle: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.budget <= 1:
            raise BudgetError(f"budget is {self.budget!r}; give a FLOPs ratio above 0 and at most 1, such as 0.5")
        for name in ("warmup", "complete", "anneal", "settle"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1], a share of the run")

    def target(self, step: int) -> float:
        """Lambda at a step: 1 at the start, ``budget`` once warm."""
        progress = min(step / max(self.warmup * self.steps, 1), 1.0)
        return 1.0 + progress * (self.budget - 1.0)

    def noise_scale(self, step: int) -> float:
        """Gate noise at a step: 1, then down to 0 where the gates settle."""
        remaining = ((1 - self.settle) * self.steps - 1 - step) / max(self.anneal * self.steps, 1)
        return min(max(remaining, 0.0), 1.0)

    @property
    def complete_steps(self) -> int:
        """Steps that train the complete model too."""
        return round((1 - self.settle if self.distill else self.complete) * self.steps)

    @property
    def router_learning_rate(self) -> float:
        """Fast enough that a gate can travel from its initial logit to zero and back while lambda falls.

        At 1e-4 Adam moves a router's bias of +15 by 15 in 150,000 steps, the published length; a run
        of a thousand steps would never close a gate.
        """
        return max(self.learning_rate, 2 * WIDTH_BIAS / max(self.warmup * self.steps, 1))


def _require(holds: bool, name: str, value: float, must_be: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}; it must be {must_be}")
