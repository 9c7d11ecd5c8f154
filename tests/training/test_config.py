from __future__ import annotations

import pytest

from dyexport.errors import BudgetError, UsageError
from dyexport.training.config import FinetuneConfig, TrainConfig


def test_lambda_falls_linearly_then_stays() -> None:
    config = FinetuneConfig(steps=100, budget=0.4, warmup=0.5)
    assert [config.target(step) for step in (0, 25, 50, 99)] == pytest.approx([1.0, 0.7, 0.4, 0.4])


def test_small_budgets_have_more_steps_and_all_are_spread_over_the_run() -> None:
    budgets = (0.3, 0.5, 0.7)
    config = FinetuneConfig(steps=2500, budgets=budgets)
    steps = [config.budget_at(step) for step in range(config.steps)]
    for begin in range(0, config.steps, 250):
        counts = [steps[begin : begin + 250].count(budget) for budget in budgets]
        assert counts == pytest.approx(
            [250 * (1 / budget) / sum(1 / each for each in budgets) for budget in budgets], abs=3
        )


def test_gate_noise_is_gone_at_the_last_step() -> None:
    config = FinetuneConfig(steps=100, anneal=0.2, settle=0.4)
    assert [config.noise_scale(step) for step in (0, 39)] == [1.0, 1.0]
    assert 0 < config.noise_scale(50) < 1
    assert [config.noise_scale(step) for step in (59, 99)] == [0.0, 0.0]


def test_routers_can_close_within_the_warmup_of_a_short_run_and_keep_the_published_rate_in_a_long_one() -> None:
    short = FinetuneConfig(steps=1000, warmup=0.3)
    assert short.router_learning_rate * 300 >= 15
    assert FinetuneConfig(steps=2_000_000).router_learning_rate == 1e-4


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan")])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(BudgetError, match="give a FLOPs ratio above 0 and at most 1"):
        FinetuneConfig(steps=10, budget=budget)


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"learning_rate": -1.0}, {"ema_decay": 1.0}, {"warmup": 2.0}, {"grad_clip": float("nan")}]
)
def test_values_out_of_range_are_named(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(changes))} is .*; it must be"):
        FinetuneConfig(**{"steps": 10, **changes})  # type: ignore[arg-type]


def test_digest_tells_runs_apart_but_not_how_often_they_are_saved() -> None:
    base = TrainConfig(steps=10)
    assert base.digest() == TrainConfig(steps=10, checkpoint_every=3).digest()
    assert base.digest() != TrainConfig(steps=11).digest()
    assert base.digest() != FinetuneConfig(steps=10).digest()


def test_learning_rate_falls_to_zero_over_the_last_share() -> None:
    config = TrainConfig(steps=100, lr_decay=0.5)
    assert [config.rate_scale(step) for step in (0, 49, 50, 75, 99)] == [1.0, 1.0, 1.0, 0.5, 0.02]
    assert {TrainConfig(steps=100).rate_scale(step) for step in range(100)} == {1.0}
