from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from dyexport.models.dynamic import DynamicOutput
from dyexport.training.losses import DdpmObjective, FlowObjective, flops_penalty, flops_ratio
from dyexport.training.randomness import TIMESTEP_BINS, stratified_uniform
from tests.factories import uniform_flops


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_flow_ends_are_noise_and_data() -> None:
    clean, noise = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    batch = FlowObjective().noisy(clean, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(batch.latents[0], noise[0])
    assert torch.equal(batch.latents[1], clean[1])
    torch.testing.assert_close(batch.latents[0] + batch.target[0], clean[0])


def test_flow_ignores_the_channels_of_a_learned_sigma() -> None:
    objective = FlowObjective()
    batch = objective.noisy(normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), torch.rand(2))
    prediction = torch.cat([batch.target, normal(2, 3, 4, 4, seed=2)], dim=1)
    assert torch.equal(objective.loss(prediction, batch), torch.zeros(2))


def test_ddpm_covers_its_thousand_timesteps() -> None:
    uniform = torch.tensor([0.0, 0.4999, 0.5, 1.0])
    batch = DdpmObjective().noisy(normal(4, 1, 2, 2), normal(4, 1, 2, 2), uniform)
    assert batch.timestep.tolist() == [0, 499, 500, 999]


def test_ddpm_loss_is_the_error_in_the_noise() -> None:
    objective = DdpmObjective()
    batch = objective.noisy(normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1), torch.rand(4))
    torch.testing.assert_close(objective.loss(batch.target + 3, batch), torch.full((4,), 9.0))


@pytest.mark.parametrize("timestep", [1, 2, 50, 500, 999])
def test_variational_bound_is_the_kl_between_the_two_posteriors(timestep: int) -> None:
    objective = DdpmObjective()
    clean, noise = normal(1, 2, 3, 3), normal(1, 2, 3, 3, seed=1)
    batch = objective.noisy(clean, noise, torch.tensor([(timestep + 0.5) / 1000]))
    predicted, variance = noise + 0.3 * normal(1, 2, 3, 3, seed=2), normal(1, 2, 3, 3, seed=3).tanh()

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    now, before, beta = alpha_bar[timestep], alpha_bar[timestep - 1], betas[timestep]
    least = beta * (1 - before) / (1 - now)

    def posterior_mean(x0: torch.Tensor) -> torch.Tensor:  # Ho et al. 2020, eq. 7
        return before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * batch.latents

    x0 = (batch.latents - (1 - now).sqrt() * predicted) / now.sqrt()
    deviation = torch.exp(0.5 * torch.lerp(least.log().expand(1), beta.log().expand(1), (variance.double() + 1) / 2))
    kl = kl_divergence(Normal(posterior_mean(clean.double()), least.sqrt()), Normal(posterior_mean(x0), deviation))
    expected = kl.mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(
        objective.variational_bound(predicted, variance, batch).double(), expected, rtol=1e-4, atol=1e-6
    )


def test_the_last_step_is_priced_in_bits_of_the_data() -> None:
    objective = DdpmObjective()
    clean = torch.zeros(1, 1, 2, 2)
    batch = objective.noisy(clean, normal(1, 1, 2, 2), torch.zeros(1))
    bound = objective.variational_bound(batch.target, torch.ones(1, 1, 2, 2), batch)
    # The true noise predicted: the mean is the data, and the deviation is sqrt(beta_0) = 0.01.
    mass = math.erf((1 / 255) / (0.01 * math.sqrt(2)))
    torch.testing.assert_close(bound, torch.tensor([-math.log2(mass)]), rtol=1e-3, atol=0)


def test_variance_learns_without_moving_the_mean() -> None:
    objective = DdpmObjective()
    batch = objective.noisy(normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1), torch.rand(4))
    noise = normal(4, 1, 2, 2, seed=2).requires_grad_()
    variance = torch.zeros(4, 1, 2, 2, requires_grad=True)
    objective.loss(torch.cat([noise, variance], dim=1), batch).sum().backward()
    assert noise.grad is not None
    assert variance.grad is not None
    torch.testing.assert_close(noise.grad, 2 * (noise - batch.target).detach() / 4)
    assert (variance.grad != 0).all()


@given(count=st.integers(1, 64), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_timesteps_fill_four_bins_evenly(count: int, seed: int) -> None:
    uniform = stratified_uniform(count, torch.Generator().manual_seed(seed))
    filled = torch.bincount((uniform * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1), minlength=TIMESTEP_BINS)
    assert filled.max() - filled.min() <= 1


def test_flops_ratio_multiplies_groups_by_tokens_within_a_sample() -> None:
    flops = uniform_flops(depth=1, attention=1.0, mlp=3.0)
    heads = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])  # shares 1/2 and 1
    tokens = torch.tensor([[[1.0, 1.0, 1.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]]])  # shares 3/4 and 1/4
    output = DynamicOutput(torch.zeros(()), heads, heads, tokens, tokens)
    expected = [(0.5 + 3 * 0.5 * 0.75) / 4, (1 + 3 * 0.25) / 4]
    assert flops_ratio(output, flops).tolist() == pytest.approx(expected)


def test_penalty_of_two_processes_has_the_gradient_of_the_global_mean() -> None:
    ratios = torch.tensor([0.9, 0.3], requires_grad=True)
    overall = ratios.mean().detach()
    penalties = [flops_penalty(ratio, overall, 0.5) for ratio in ratios]
    assert [p.item() for p in penalties] == pytest.approx([2 * 0.1**2] * 2)
    (sum(penalties) / 2).backward()  # processes average their gradients
    assert ratios.grad is not None
    assert ratios.grad.tolist() == pytest.approx([4 * 0.1 / 2] * 2)
