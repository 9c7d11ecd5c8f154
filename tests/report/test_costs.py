"""Steps, their engines and their FLOPs are those of the plan and of the pipelines that sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dyexport.bundle.golden import GOLDEN, GoldenData
from dyexport.bundle.reader import Bundle
from dyexport.report.costs import step_costs
from dyexport.report.figures.timeline import runs_of
from dyexport.report.pictures import Call, false_colors, take_samples
from dyexport.report.settings import ReportSettings
from dyexport.report.token_masks import Compared, kept_tokens, tokens_at
from dyexport.report.trajectory import Step, Trajectory, trajectory_of
from tests.runtime.bundles import make_segment, make_widths


@pytest.mark.parametrize("name", ["sit_tiny", "dit_tiny", "flux_tiny", "latte_tiny"])
def test_steps_are_those_that_sampling_takes(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    spec, plan = bundle.manifest.model, bundle.manifest.plan
    taken = take_samples(bundle, ReportSettings(samples=1, steps=3))
    trajectory = trajectory_of(spec, plan, 3)
    assert [step.t for step in trajectory.steps] == pytest.approx([call.t for call in taken.calls], rel=1e-6)
    assert [step.segment for step in trajectory.steps] == [plan.segment_for(call.t) for call in taken.calls]
    assert taken.slim.shape[:2] == (1, 1 if spec.pixel_space else 3)


def test_flops_over_the_range_are_those_of_the_plan(sit_tiny: Bundle) -> None:
    plan, (start, end) = sit_tiny.manifest.plan, sit_tiny.manifest.plan.span
    points = np.linspace(start, end, 2049)[:-1] + (end - start) / 4096
    steps = tuple(Step(index=i, t=float(t), segment=plan.segment_for(float(t))) for i, t in enumerate(points))
    costs = step_costs(sit_tiny, Trajectory(steps=steps, scheduler=""))
    assert np.mean([cost.gated for cost in costs.steps]) == pytest.approx(plan.network_flops_ratio, rel=1e-9)
    assert costs.executed == pytest.approx(plan.executed_flops_ratio, rel=5e-3)  # the plan samples tokens at 17 points
    assert all(cost.executed <= 1.05 for cost in costs.steps)


def test_runs_of_steps_are_joined() -> None:
    steps = tuple(Step(index=index, t=0.0, segment=segment) for index, segment in enumerate([0, 0, 1, 0]))
    assert [(a.index, b.index) for a, b in runs_of(steps)] == [(0, 1), (2, 2), (3, 3)]
    assert Trajectory(steps=steps, scheduler="").switches == 2


@pytest.mark.parametrize("name", ["sit_tiny", "flux_tiny"])
def test_tokens_are_those_that_the_masked_model_keeps(name: str, request: pytest.FixtureRequest) -> None:
    """Golden data has the masked model's counts at some timesteps, and the inputs that they are of."""
    import torch

    bundle: Bundle = request.getfixturevalue(name)
    golden = GoldenData.load(bundle.root / GOLDEN)
    calls = [
        Call(t=sample.timestep, arguments={name: torch.from_numpy(array) for name, array in sample.inputs.items()})
        for sample in golden.samples
    ]
    steps = tokens_at(bundle, calls)
    assert steps is not None
    for step, sample in zip(steps, golden.samples, strict=True):
        assert [kept.sum() for kept in step.kept.values()] == sample.kept_tokens[0].tolist()
        assert all(kept.shape == (golden.info.tokens,) for kept in step.kept.values())


def test_a_block_with_a_capacity_is_read_from_its_router() -> None:
    """It also compares the tokens that it picked: fewer, or as many in another order; and text comes first."""
    segment = make_segment(make_widths(1.0), slice(0, 2), "capacity", 3)
    assert segment.depth == 2
    kept = np.array([[True, False, True, False], [False] * 4])
    text = np.concatenate([np.ones((2, 2), bool), kept], axis=1)
    compared = [
        Compared("a", np.ones((6, 1), bool)),
        Compared("a", kept),
        Compared("b", text[:, ::-1]),
        Compared("b", text),
    ]
    found = kept_tokens(segment, compared, batch=2, tokens=4)
    assert found is not None
    assert [found[block].tolist() for block in (0, 1)] == [kept[0].tolist()] * 2
    assert kept_tokens(segment, compared[:2], batch=2, tokens=4) is None


def test_false_colors_are_the_same_for_equal_latents() -> None:
    import torch

    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    first, second = false_colors([latents, latents.clone()])
    assert first.shape == (2, 3, 6, 6)
    assert (first == second).all()
    assert 0 <= first.min() < 0.05 < 0.95 < first.max() <= 1
    packed = latents[:, :, 0, :].transpose(1, 2)  # (B, N, C)
    assert false_colors([packed])[0].shape == (2, 3, 2, 3)
    gray = false_colors([latents[:, :1]])[0]
    assert (gray[:, 0] == gray[:, 1]).all()


def test_a_vae_decodes_latents(dit_tiny: Bundle, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    channels = dit_tiny.manifest.model.latent_shape[0]
    vae = AutoencoderKL(latent_channels=channels, block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(tmp_path / "vae")
    taken = take_samples(dit_tiny, ReportSettings(samples=1, steps=2, vae=str(tmp_path / "vae")))
    assert taken.pixels
    assert taken.slim.shape[:2] == (1, 3)
    assert 0 <= taken.slim.min() <= taken.slim.max() <= 1
