"""Sampling from class labels: one loop for DDPM, one for flow matching."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray

from dyexport.arguments import check_batch, check_guidance, check_labels, check_seed, check_steps, shown
from dyexport.backbones import get_pipeline
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import CheckpointError, SamplingError, UsageError
from dyexport.progress import Progress, no_progress

FLOW_PREDICTION = "flow_prediction"  # diffusers' word for a velocity, in schedulers that sample other models, too
ROUNDING = 1e-5  # how far a sigma of 1 may be off

Noise = torch.Generator | list[torch.Generator]
"""Generator of the noise of a batch, or one generator per sample."""

Observer = Callable[[torch.Tensor], None]
"""Called with the latents after each step, which it must not change: (B, ...)."""


def no_observer(latents: torch.Tensor) -> None:
    """Ignore the latents of a step."""


class Denoiser(Protocol):
    """Network that the loops call: a bundle, a diffusers transformer or a masked torch model."""

    def __call__(self, *, hidden_states: Any, timestep: Any, class_labels: Any) -> Any: ...


def open_vae(source: str, kind: str = "AutoencoderKL") -> Any:
    """Open the VAE in a directory or hub repository; ``kind`` is its diffusers class. Raises ``CheckpointError``."""
    import diffusers

    try:
        return getattr(diffusers, kind).from_pretrained(source).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read an {kind} from {source}: {error}") from error


def noise_of(seed: int | Sequence[int], count: int) -> Noise:
    """Make generators from one seed for a batch, or one per sample. Raises ``UsageError`` for anything else."""
    if not isinstance(seed, Sequence):
        return torch.Generator().manual_seed(check_seed(seed))
    if len(seed) != count:
        raise UsageError(f"there are {len(seed)} seeds for {count} samples; give one, or one for each")
    return [torch.Generator().manual_seed(check_seed(one)) for one in seed]


@torch.no_grad()
def sample(
    transformer: Denoiser,
    spec: ModelSpec,
    labels: Sequence[int] | torch.Tensor,
    *,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance_scale: float | None = None,
    seed: int | Sequence[int] = 0,
    progress: Progress = no_progress,
    observe: Observer = no_observer,
) -> torch.Tensor:
    """Sample one picture per label (B,): pixels in [0, 1], or latents if a VAE must decode them, (B, C, H, W).

    ``steps`` and ``guidance_scale`` default to the model's; a scale of 1 turns classifier-free guidance off. The same
    seed gives the same noise on every device. With one seed per label, a picture does not depend on the rest of its
    batch. Raises ``UsageError`` for values out of range, and ``SamplingError`` if the result is not finite.
    """
    pipeline = get_pipeline(spec.backbone)
    if pipeline.takes != "labels":
        raise UsageError(f"{spec.name} is sampled from prompts, not from labels; see dyexport.runtime.prompts")
    defaults = pipeline.defaults(spec)
    steps = check_steps(defaults.steps if steps is None else steps)
    scale = check_guidance(defaults.guidance if guidance_scale is None else guidance_scale, "guidance_scale")
    labels = _checked_labels(labels, spec.classes)  # (B,)
    loop = sample_ddpm if spec.objective == "ddpm" else sample_flow
    noise, chosen = noise_of(seed, len(labels)), pipeline.scheduler(spec, scheduler)
    latents = loop(transformer, spec, labels, steps, scale, noise, chosen, progress=progress, observe=observe)
    check_finite(latents)
    return (latents / 2 + 0.5).clamp(0, 1) if spec.pixel_space else latents  # (B, C, H, W)


def _checked_labels(labels: Sequence[int] | torch.Tensor, classes: int) -> torch.Tensor:
    """Return labels (B,) as int64. Raises ``UsageError`` for anything but a list of classes."""
    cure = f"labels must be in [0, {classes}], {classes} being no class"
    if not isinstance(labels, torch.Tensor):
        check_batch(labels)  # before memory is taken for them
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{cure}: {shown(labels)}") from error
    fractions = values.dtype == torch.bool or values.is_floating_point() or values.is_complex()
    if values.ndim != 1 or not values.numel() or fractions:
        raise UsageError(f"{cure}, in a list of whole numbers: {shown(labels)}")
    check_labels(values.tolist(), classes)
    return values.to(torch.int64)


def check_finite(values: torch.Tensor) -> None:
    """Raise ``SamplingError`` for latents or pixels that are not finite."""
    if not bool(values.isfinite().all()):
        raise SamplingError(
            "sampling gave values that are not finite; lower the guidance, or see `dyexport verify` of the bundle"
        )


def sample_ddpm(
    transformer: Denoiser,
    spec: ModelSpec,
    labels: torch.Tensor,
    steps: int,
    guidance_scale: float,
    generator: Noise,
    scheduler: Any,
    *,
    progress: Progress = no_progress,
    observe: Observer = no_observer,
) -> torch.Tensor:
    """Sample from noise at t = 999 down to data; the network predicts the noise (arXiv 2212.09748): (B, C, H, W)."""
    latents = _noise(spec, labels, generator)  # (B, C, H, W)
    latents = latents.to(device_of(transformer)) * scheduler.init_noise_sigma
    scheduler.set_timesteps(steps)
    for done, t in enumerate(scheduler.timesteps, start=1):
        scaled = scheduler.scale_model_input(latents, t)  # (B, C, H, W)
        noise = guided(transformer, spec, scaled, float(t), labels, guidance_scale)  # (B, C, H, W)
        latents = _advance(scheduler, noise, t, latents, generator)
        observe(latents)
        progress(done, len(scheduler.timesteps))
    return latents


def sample_flow(
    transformer: Denoiser,
    spec: ModelSpec,
    labels: torch.Tensor,
    steps: int,
    guidance_scale: float,
    generator: Noise,
    scheduler: Any,
    *,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    progress: Progress = no_progress,
    observe: Observer = no_observer,
) -> torch.Tensor:
    """Sample along the velocity from noise at t = 0 to data at t = 1 (arXiv 2401.08740): (B, C, H, W).

    ``scheduler`` is any diffusers scheduler for flow matching. It counts sigma = 1 - t down and expects the opposite
    velocity, noise - data. ``sigmas``, one per step, and the shift ``mu`` are passed to schedulers that take them.
    Raises ``UsageError`` for one that does not, and for one that is not set up for flow matching.
    """
    latents = _noise(spec, labels, generator)  # (B, C, H, W)
    latents = latents.to(device_of(transformer))
    _set_timesteps(scheduler, steps, sigmas=sigmas, mu=mu)
    times = zip(scheduler.timesteps, scheduler.sigmas, strict=False)  # sigmas also has the end, 0
    for done, (timestep, sigma) in enumerate(times, start=1):
        t = min(max(1.0 - float(sigma), 0.0), spec.timestep_range[1])  # a shift may round 1 up
        velocity = guided(transformer, spec, latents, t, labels, guidance_scale)  # (B, C, H, W)
        latents = _advance(scheduler, -velocity, timestep, latents, generator)
        observe(latents)
        progress(done, len(scheduler.timesteps))
    return latents


def _noise(spec: ModelSpec, labels: torch.Tensor, generator: Noise) -> torch.Tensor:
    shape = (len(labels), *spec.latent_shape)  # (B, C, H, W)
    noise: torch.Tensor = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
    return noise


def _set_timesteps(scheduler: Any, steps: int, *, sigmas: Sequence[float] | None, mu: float | None) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("prediction_type", FLOW_PREDICTION) != FLOW_PREDICTION or not config.get("use_flow_sigmas", True):
        raise _not_for_flow(scheduler)
    length = {"num_inference_steps": steps} if sigmas is None else {"sigmas": _checked_sigmas(sigmas, steps)}
    arguments = {**length, **({} if mu is None else {"mu": mu})}
    if unknown := arguments.keys() - inspect.signature(scheduler.set_timesteps).parameters.keys():
        raise UsageError(f"{name} takes no {min(unknown)}; leave it out, or choose another scheduler")
    shifts = config.get("use_dynamic_shifting", False)
    if shifts and mu is None:
        raise UsageError(f"{name} has use_dynamic_shifting, which needs a shift; pass mu, or make it without")
    if mu is not None and not shifts:
        raise UsageError(f"mu is {mu}, and {name} ignores it; make it with use_dynamic_shifting=True, or leave mu out")
    scheduler.set_timesteps(**arguments)
    chosen = getattr(scheduler, "sigmas", None)
    if chosen is None or not _within_unit(chosen):
        raise _not_for_flow(scheduler)


def _checked_sigmas(sigmas: Sequence[float], steps: int) -> NDArray[np.float32]:
    """Return sigmas (steps,) as an array, since some schedulers take no list. Raises ``UsageError``."""
    if len(sigmas) != steps:
        raise UsageError(f"steps is {steps} and there are {len(sigmas)} sigmas; give one for each step")
    values = torch.as_tensor(sigmas, dtype=torch.float32)  # (steps,)
    if not _within_unit(values):
        raise UsageError(f"sigmas must be in [0, 1]: {shown(sigmas)}")
    return values.numpy()


def _within_unit(sigmas: torch.Tensor) -> bool:
    """Return whether sigmas are those of flow matching, up to rounding."""
    return bool(((sigmas >= 0) & (sigmas <= 1 + ROUNDING)).all())


def _not_for_flow(scheduler: Any) -> UsageError:
    return UsageError(
        f"{type(scheduler).__name__} is not set up for flow matching; make it with use_flow_sigmas=True and "
        f"prediction_type={FLOW_PREDICTION!r} where it has them, or use FlowMatchEulerDiscreteScheduler"
    )


def _advance(
    scheduler: Any, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: Noise
) -> torch.Tensor:
    """Do one step of a scheduler, with the generator if it is stochastic."""
    stochastic = "generator" in inspect.signature(scheduler.step).parameters
    random = {"generator": generator} if stochastic else {}
    stepped: torch.Tensor = scheduler.step(prediction, timestep, latents, return_dict=False, **random)[0]
    return stepped


def guided(
    transformer: Denoiser, spec: ModelSpec, latents: torch.Tensor, t: float, labels: torch.Tensor, scale: float
) -> torch.Tensor:
    """Predict under classifier-free guidance in one call, without a learned sigma: (B, C, H, W)."""
    labels = labels.to(latents.device)  # (B,)
    if scale != 1.0:
        latents = torch.cat([latents, latents])  # (2B, C, H, W)
        labels = torch.cat([labels, torch.full_like(labels, spec.classes)])  # (2B,)
    timestep = torch.full((len(latents),), t, dtype=torch.float32, device=latents.device)  # (B or 2B,)
    output = transformer(hidden_states=latents, timestep=timestep, class_labels=labels).sample
    output = output[:, : spec.latent_shape[0]]  # (B or 2B, C, H, W)
    if scale == 1.0:
        return output
    conditional, unconditional = output.chunk(2)  # (B, C, H, W) each
    return unconditional + scale * (conditional - unconditional)


@torch.inference_mode()
def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, 4, h, w) with an ``AutoencoderKL`` to pixels in [0, 1]: (B, 3, H, W)."""
    decoded = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample  # (B, 3, H, W)
    check_finite(decoded)
    pixels: torch.Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
    return pixels


def device_of(transformer: Denoiser) -> torch.device:
    return torch.device(getattr(transformer, "device", "cpu"))
