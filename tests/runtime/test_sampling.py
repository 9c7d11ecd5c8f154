"""From noise to pixels: the same pictures from a bundle as from the masked network, at any number of steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

from dyexport.backbones import sampling_defaults
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import DyexportError, UsageError
from dyexport.noise_schedule import make_scheduler
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import decode, guided, sample, sample_flow
from tests.engines.tiny import CHANNELS, CLASSES, SIZE
from tests.runtime.bundles import TinyBundle, make_spec
from tests.runtime.dit_pipeline import PixelVAE, pixel_pipeline

LABELS = [3, 1, 4]


class Recorder:
    """Calls another model and remembers the t it was called at."""

    def __init__(self, model: object) -> None:
        self.model, self.times = model, []

    def __call__(self, **inputs: torch.Tensor) -> object:
        self.times.append(float(inputs["timestep"][0]))
        return self.model(**inputs)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ddpm_pictures_are_the_masked_networks(ddpm: TinyBundle, scheduler: str, steps: int, guidance: float) -> None:
    arguments = {"steps": steps, "scheduler": scheduler, "guidance_scale": guidance, "seed": 7}
    ours = sample(load(ddpm.root), ddpm.spec, LABELS, **arguments)
    torch.testing.assert_close(ours, sample(ddpm, ddpm.spec, LABELS, **arguments), atol=1e-3, rtol=0)
    assert ours.shape == (3, CHANNELS, SIZE, SIZE)
    assert 0 <= ours.min() <= ours.max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_flow_pictures_are_the_masked_networks(flow: TinyBundle, steps: int) -> None:
    recorder = Recorder(load(flow.root))
    ours = sample(recorder, flow.spec, LABELS, steps=steps, seed=3)
    torch.testing.assert_close(ours, sample(flow, flow.spec, LABELS, steps=steps, seed=3), atol=1e-3, rtol=0)
    assert len(recorder.times) == steps
    assert recorder.times == sorted(recorder.times)
    assert recorder.times[0] == 0.0
    assert recorder.times[-1] <= flow.spec.timestep_range[1]


def test_flow_follows_the_velocity_from_noise_to_data(flow: TinyBundle) -> None:
    """With the true velocity of a straight path, one step or many end at the data."""
    data = torch.linspace(-1, 1, CHANNELS * SIZE * SIZE).reshape(1, CHANNELS, SIZE, SIZE)

    class Straight:
        def __call__(
            self, *, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
        ) -> object:
            remaining = (1 - timestep).reshape(-1, 1, 1, 1)
            return type("Output", (), {"sample": (data - hidden_states) / remaining})

    for steps in (1, 3, 20):
        generator = torch.Generator().manual_seed(0)
        scheduler = make_scheduler(flow.spec)
        latents = sample_flow(Straight(), flow.spec, torch.tensor([1]), steps, 1.0, generator, scheduler)
        torch.testing.assert_close(latents, data, atol=1e-4, rtol=0)


def test_ddim_removes_noise_that_is_predicted_exactly(ddpm: TinyBundle) -> None:
    data = torch.linspace(-1, 1, CHANNELS * SIZE * SIZE).reshape(1, CHANNELS, SIZE, SIZE)
    alphas = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod

    class Oracle:
        def __call__(
            self, *, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
        ) -> object:
            alpha = alphas[int(timestep[0])]
            return type("Output", (), {"sample": (hidden_states - alpha.sqrt() * data) / (1 - alpha).sqrt()})

    picture = sample(Oracle(), ddpm.spec, [1], steps=10, scheduler="ddim", guidance_scale=1.0)
    torch.testing.assert_close(picture, data / 2 + 0.5, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
@pytest.mark.parametrize("steps", [2, 9])
def test_stock_pipeline_end_to_end(ddpm: TinyBundle, scheduler: str, steps: int) -> None:
    transformer = load(ddpm.root)
    pipe = pixel_pipeline(transformer, ddpm.spec, scheduler).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, DiTPipeline)
    arguments = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "np"}
    images = pipe(LABELS, generator=torch.Generator().manual_seed(5), **arguments).images
    assert images.shape == (3, SIZE, SIZE, CHANNELS)
    loop = sample(ddpm, ddpm.spec, LABELS, steps=steps, scheduler=scheduler, guidance_scale=3.0, seed=5)
    np.testing.assert_allclose(images, loop.permute(0, 2, 3, 1).numpy(), atol=1e-3)
    assert sum(switch.count for switch in transformer.residency.switches) >= min(steps, 3)


def test_stock_pipeline_offloads_around_it(ddpm: TinyBundle) -> None:
    images = []
    for offload in (False, True):
        pipe = pixel_pipeline(load(ddpm.root), ddpm.spec)
        pipe.set_progress_bar_config(disable=True)
        if offload:
            pipe.enable_model_cpu_offload(device="cpu")
        arguments = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        images.append(pipe(LABELS, **arguments).images)
    np.testing.assert_array_equal(*images)


def test_switches_happen_at_the_bounds_of_the_segments(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    recorder = Recorder(transformer)
    chosen = []
    for t in make_times(ddpm.spec, 25):
        recorder(hidden_states=torch.zeros(1, 2, 2, 2), timestep=torch.tensor([t]), class_labels=torch.tensor([0]))
        chosen.append(transformer.engine._current)
    wanted = [ddpm.plan.segment_for(t) for t in recorder.times]
    assert chosen == wanted
    assert sorted(set(wanted), reverse=True) == [2, 1, 0]


def make_times(spec: ModelSpec, steps: int) -> list[float]:
    scheduler = make_scheduler(spec, "ddim")
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]


def test_a_stock_diffusers_transformer_samples_too() -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 2, "patch_size": 1}
    config |= {"in_channels": CHANNELS, "out_channels": 2 * CHANNELS, "num_embeds_ada_norm": CLASSES}
    transformer = DiTTransformer2DModel(**config).eval()
    for objective in ("ddpm", "flow"):
        spec = make_spec(objective)
        picture = sample(transformer, spec, LABELS, steps=3)
        assert picture.shape == (3, CHANNELS, SIZE, SIZE)
        assert torch.equal(picture, sample(transformer, spec, LABELS, steps=3))
        assert not torch.equal(picture, sample(transformer, spec, LABELS, steps=3, seed=1))


def test_latents_are_not_clamped(ddpm: TinyBundle) -> None:
    spec = ddpm.spec.model_copy(update={"pixel_space": False})
    latents = sample(load(ddpm.root), spec, LABELS, steps=4, guidance_scale=9.0)
    assert latents.abs().max() > 1


def test_guidance_mixes_both_halves_and_leaves_sigma_out(ddpm: TinyBundle) -> None:
    def model(*, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> object:
        value = class_labels.float().reshape(-1, 1, 1, 1).expand(-1, 2 * CHANNELS, SIZE, SIZE)
        return type("Output", (), {"sample": value})

    latents = torch.zeros(1, CHANNELS, SIZE, SIZE)
    mixed = guided(model, ddpm.spec, latents, 0.0, torch.tensor([4]), 3.0)
    assert torch.equal(mixed, torch.full_like(latents, CLASSES + 3.0 * (4 - CLASSES)))
    assert torch.equal(guided(model, ddpm.spec, latents, 0.0, torch.tensor([4]), 1.0), torch.full_like(latents, 4.0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"scheduler": "euler"}, "'euler' does not sample tiny; use ddim or dpm"),
        ({"labels": [0, CLASSES + 1]}, "labels must be in"),
        ({"steps": 2.5}, r"steps is 2\.5"),
        ({"steps": True}, "steps is True"),
        ({"steps": 10**5000}, "thousands of digits"),
        ({"labels": [-1]}, "labels must be in"),
        ({"labels": [3.7]}, "labels must be in"),
        ({"labels": [True, False]}, "labels must be in"),
        ({"labels": [[1, 2]]}, "labels must be in"),
        ({"labels": []}, "labels must be in"),
        ({"labels": ["cat"]}, "labels must be in"),
        ({"labels": range(10**11)}, "there are 100000000000 labels"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"guidance_scale": np.float32("nan")}, "guidance_scale is"),
        ({"guidance_scale": 1e38}, "guidance_scale is 1e"),
        ({"guidance_scale": "3"}, "guidance_scale is 3"),
        ({"guidance_scale": torch.tensor([1.0, 2.0])}, "guidance_scale is tensor"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"seed": [1, 2, 2**63]}, f"seed is {2**63}"),
        ({"seed": [1]}, "1 seeds for 3 samples"),
    ],
)
def test_values_out_of_range_are_refused(ddpm: TinyBundle, arguments: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        sample(ddpm, ddpm.spec, **{"labels": LABELS, **arguments})


def test_whole_numbers_of_other_libraries_count(ddpm: TinyBundle) -> None:
    own = sample(ddpm, ddpm.spec, LABELS, steps=2, guidance_scale=2.0, seed=3)
    numbers = {"steps": np.int64(2), "guidance_scale": np.float32(2), "seed": np.uint8(3)}
    assert torch.equal(own, sample(ddpm, ddpm.spec, np.array(LABELS), **numbers))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_network_that_overflows_draws_no_picture(
    objective: str, value: float, request: pytest.FixtureRequest
) -> None:
    bundle: TinyBundle = request.getfixturevalue(objective)

    def overflowing(**inputs: torch.Tensor) -> object:
        return SimpleNamespace(sample=torch.full_like(inputs["hidden_states"], value))

    latents = bundle.spec.model_copy(update={"pixel_space": False})
    with pytest.raises(DyexportError, match="not finite"):
        sample(overflowing, latents, LABELS, steps=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vae_that_overflows_draws_no_picture(value: float) -> None:
    latents = torch.tensor([0.0, value]).reshape(1, 1, 1, 2)
    with pytest.raises(DyexportError, match="not finite"):
        decode(PixelVAE(), latents)


def test_schedulers() -> None:
    assert isinstance(make_scheduler(make_spec(), "dpm++"), DPMSolverMultistepScheduler)
    assert make_scheduler(make_spec()).config.beta_end == 0.02
    assert make_scheduler(make_spec()).config.clip_sample, "pixels are bounded"
    assert not make_scheduler(make_spec().model_copy(update={"pixel_space": False})).config.clip_sample
    assert make_scheduler(make_spec("flow")).config.num_train_timesteps == 1000


def test_what_is_not_asked_for_is_the_models_default(ddpm: TinyBundle, flow: TinyBundle) -> None:
    for bundle in (ddpm, flow):
        recorder = Recorder(load(bundle.root))
        default = sample(recorder, bundle.spec, LABELS)
        usual = sampling_defaults(bundle.spec)
        assert len(recorder.times) == usual.steps
        asked = {"steps": usual.steps, "guidance_scale": usual.guidance}
        assert torch.equal(default, sample(load(bundle.root), bundle.spec, LABELS, **asked))
