"""The sampling loops with schedulers that people bring along from diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from dyexport.errors import UsageError
from dyexport.noise_schedule import make_scheduler
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import sample, sample_ddpm, sample_flow
from tests.engines.tiny import CHANNELS, SIZE
from tests.runtime.bundles import TinyBundle
from tests.runtime.test_sampling import LABELS, Recorder

FLOW: dict[str, Any] = {
    "Heun": FlowMatchHeunDiscreteScheduler,
    "LCM": FlowMatchLCMScheduler,
    "UniPC": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "DPM": lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "Euler": FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize("scheduler", FLOW.values(), ids=FLOW)
def test_any_flow_scheduler_ends_at_the_data(flow: TinyBundle, scheduler: Any) -> None:
    """Where the prediction is exact at every t, which every solver must then be, too."""
    data = torch.linspace(-1, 1, CHANNELS * SIZE * SIZE).reshape(1, CHANNELS, SIZE, SIZE)

    def straight(*, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> object:
        return SimpleNamespace(sample=(data - hidden_states) / (1 - timestep).reshape(-1, 1, 1, 1))

    generator = torch.Generator().manual_seed(0)
    latents = sample_flow(straight, flow.spec, torch.tensor([1]), 6, 1.0, generator, scheduler())
    torch.testing.assert_close(latents, data, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scheduler", FLOW.values(), ids=FLOW)
def test_any_flow_scheduler_samples_a_bundle(flow: TinyBundle, scheduler: Any) -> None:
    drawn, truth = (
        sample_flow(model, flow.spec, torch.tensor(LABELS), 6, 3.0, torch.Generator().manual_seed(0), scheduler())
        for model in (load(flow.root), flow)
    )
    torch.testing.assert_close(drawn, truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler,
        PNDMScheduler,
        HeunDiscreteScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
    ],
)
def test_any_scheduler_samples_noise_predictions(ddpm: TinyBundle, scheduler: Any) -> None:
    """The stock pipeline knows how: pictures of both loops are the same."""
    arguments: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    transformer = load(ddpm.root)
    labels = torch.tensor(LABELS)
    ours = sample_ddpm(transformer, ddpm.spec, labels, 5, 1.0, torch.Generator().manual_seed(5), scheduler(**arguments))
    scaled = scheduler(**arguments)
    scaled.set_timesteps(5)
    truth = torch.randn(len(LABELS), CHANNELS, SIZE, SIZE, generator=(draw := torch.Generator().manual_seed(5)))
    truth = truth * scaled.init_noise_sigma
    random = {"generator": draw} if scheduler is EulerAncestralDiscreteScheduler else {}
    for t in scaled.timesteps:
        timestep = t.reshape(1).float()
        noise = transformer(scaled.scale_model_input(truth, t), timestep=timestep, class_labels=labels).sample
        truth = scaled.step(noise, t, truth, **random).prev_sample
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=0)


def test_sigmas_and_a_shift_go_to_the_scheduler(flow: TinyBundle) -> None:
    labels = torch.tensor(LABELS)
    recorder = Recorder(load(flow.root))
    draw = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    sample_flow(recorder, flow.spec, labels, 3, 1.0, draw(), make_scheduler(flow.spec), sigmas=[0.9, 0.5, 0.2])
    assert recorder.times == pytest.approx([0.1, 0.5, 0.8])
    recorder.times.clear()
    shifted = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sample_flow(recorder, flow.spec, labels, 4, 1.0, draw(), shifted, mu=1.0)
    shifted.set_timesteps(4, mu=1.0)
    assert recorder.times == pytest.approx([1 - float(sigma) for sigma in shifted.sigmas[:-1]])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sigmas": [0.9, 0.5]}, "steps is 3 and there are 2 sigmas"),
        ({"sigmas": [0.9, 0.5, 0.1]}, "FlowMatchHeunDiscreteScheduler takes no sigmas"),
        ({"mu": 1.0}, "FlowMatchHeunDiscreteScheduler takes no mu"),
    ],
)
def test_what_a_scheduler_does_not_take_is_refused(flow: TinyBundle, arguments: dict[str, Any], named: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UsageError, match=named):
        sample_flow(
            flow, flow.spec, torch.tensor([1]), 3, 1.0, generator, FlowMatchHeunDiscreteScheduler(), **arguments
        )


FLOW_SETTINGS: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, lambda: UniPCMultistepScheduler(**FLOW_SETTINGS)],
)
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_sigmas_may_be_any_sequence(flow: TinyBundle, scheduler: Any, kind: Any) -> None:
    recorder = Recorder(load(flow.root))
    sigmas, draw = [1, 0.8, 0.6, 0.4, 0.2, 0.1], torch.Generator().manual_seed(0)
    sample_flow(recorder, flow.spec, torch.tensor(LABELS), 6, 1.0, draw, scheduler(), sigmas=kind(sigmas))
    assert recorder.times == pytest.approx([1 - sigma for sigma in sigmas], abs=1e-5)


def test_a_shift_that_rounds_beyond_the_noise_samples(flow: TinyBundle) -> None:
    recorder, draw = Recorder(load(flow.root)), torch.Generator().manual_seed(0)
    rounded = FlowMatchEulerDiscreteScheduler(shift=0.12481203007518797)
    sample_flow(recorder, flow.spec, torch.tensor(LABELS), 2, 1.0, draw, rounded, sigmas=[1.0, 0.5])
    assert float(rounded.sigmas[0]) > 1
    assert recorder.times[0] == 0


@pytest.mark.parametrize(
    ("scheduler", "arguments", "named"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, "use_dynamic_shifting.*pass mu"),
        (UniPCMultistepScheduler(**FLOW_SETTINGS, use_dynamic_shifting=True), {}, "use_dynamic_shifting.*pass mu"),
        (DPMSolverMultistepScheduler(**FLOW_SETTINGS, use_dynamic_shifting=True), {}, "use_dynamic_shifting.*pass mu"),
        (DPMSolverMultistepScheduler(**FLOW_SETTINGS), {"mu": 1.0}, "mu is 1.0, and DPMSolver.* ignores it"),
        (FlowMatchEulerDiscreteScheduler(), {"mu": 1.0}, "mu is 1.0, and FlowMatchEuler.* ignores it"),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.5, 0.5, 0.1]}, r"sigmas must be in \[0, 1\].*1.5"),
    ],
)
def test_shifts_and_sigmas_that_cannot_be_are_refused(
    flow: TinyBundle, scheduler: Any, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        sample_flow(flow, flow.spec, torch.tensor([1]), 3, 1.0, torch.Generator(), scheduler, **arguments)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        PNDMScheduler(),
        EulerDiscreteScheduler(),
        HeunDiscreteScheduler(),
        UniPCMultistepScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        CMStochasticIterativeScheduler(),
        IPNDMScheduler(),
    ],
)
def test_a_scheduler_that_is_not_set_up_for_flow_matching_is_named(flow: TinyBundle, scheduler: Any) -> None:
    named = f"^{type(scheduler).__name__} is not set up for flow matching; .*use_flow_sigmas=True"
    with pytest.raises(UsageError, match=named):
        sample_flow(flow, flow.spec, torch.tensor([1]), 3, 1.0, torch.Generator(), scheduler)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_pictures_do_not_depend_on_the_default_dtype(
    objective: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(objective)
    wanted = sample(load(bundle.root), bundle.spec, LABELS, steps=7)
    torch.set_default_dtype(dtype)
    try:
        drawn = sample(load(bundle.root), bundle.spec, LABELS, steps=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, wanted, atol=1e-5, rtol=0)
