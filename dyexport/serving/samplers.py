"""Samplers: what a server keeps open between requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dyexport.backbones import get_pipeline, sampling_defaults
from dyexport.runtime.loading import load
from dyexport.runtime.prompt_settings import Prompts, prompt_pipeline
from dyexport.runtime.prompts import open_pipeline, sample_prompts
from dyexport.runtime.sampling import decode, open_vae, sample
from dyexport.runtime.transformer import BundleTransformer
from dyexport.serving.config import BUNDLE, OutputSpec, ServedModelConfig, output_of, source_of
from dyexport.serving.requests import Request, RequestParser, Settings

AfterStep = Callable[[], None]
"""Called after each denoising step; an exception ends the sampling."""


class Sampler(Protocol):
    """Samples batches of one model."""

    parser: RequestParser
    output: OutputSpec

    def sample(self, requests: Sequence[Request], after_step: AfterStep) -> np.ndarray:
        """Sample all rows of requests with equal settings as one batch: (B, *output.dims)."""


def open_sampler(folder: Path, config: ServedModelConfig, device: str | None) -> Sampler:
    """Open the model in a version folder of a repository.

    Raises what ``load`` raises, and ``CheckpointError``. Engines that do not run on this machine are an error: a server
    never falls back to another target silently.
    """
    transformer = load(
        folder / BUNDLE,
        target=config.target,
        device=device,
        memory=config.memory,
        share_weights=config.share_weights,
        fallback=False,
    )
    if get_pipeline(transformer.spec.backbone).takes == "labels":
        vae = None if config.vae is None else open_vae(source_of(folder, config.vae)).to(transformer.device)
        return LabelSampler(transformer, config, vae)
    assert config.pipeline is not None, "deploy asks for it"
    return PromptSampler(transformer, config, source_of(folder, config.pipeline))


class LabelSampler:
    """Samples one picture per class label."""

    def __init__(self, transformer: BundleTransformer, config: ServedModelConfig, vae: torch.nn.Module | None) -> None:
        spec = transformer.spec
        model = sampling_defaults(spec)
        defaults = Settings(
            steps=min(model.steps, config.max_steps), guidance=model.guidance, budget=default_budget(transformer)
        )
        self.parser = RequestParser(
            classes=spec.classes, defaults=defaults, budgets=transformer.budgets, limits=config.limits
        )
        self.output = output_of(spec, decoded=spec.pixel_space or vae is not None)
        self._transformer, self._vae, self._scheduler = transformer, vae, config.scheduler

    def sample(self, requests: Sequence[Request], after_step: AfterStep) -> np.ndarray:
        settings, rows = requests[0].settings, [row for request in requests for row in request.rows]
        if settings.budget is not None:
            self._transformer.budget = settings.budget
        values = sample(
            self._transformer,
            self._transformer.spec,
            [int(label) for label, _ in rows],
            steps=settings.steps,
            scheduler=self._scheduler,
            guidance_scale=settings.guidance,
            seed=[seed for _, seed in rows],
            progress=lambda _done, _total: after_step(),
        )  # (B, C, H, W)
        if self._vae is not None:
            values = decode(self._vae, values)
        return values.cpu().numpy() if self.output.name == "latents" else to_bytes(values)


class PromptSampler:
    """Samples one picture or video per prompt, by the model's diffusers pipeline."""

    def __init__(self, transformer: BundleTransformer, config: ServedModelConfig, pipeline: str) -> None:
        spec = transformer.spec
        self._kind = prompt_pipeline(spec)
        self._transformer = transformer
        self._pipe = open_pipeline(transformer, pipeline).to(transformer.device)
        self._pipe.set_progress_bar_config(disable=True)
        model, side = self._kind.defaults(spec), self._kind.side(spec, self._pipe.vae_scale_factor)
        steps = min(model.steps, config.max_steps)
        budget = default_budget(transformer)
        defaults = Settings(steps=steps, guidance=model.guidance, height=side, width=side, budget=budget)
        self.parser = RequestParser(classes=0, defaults=defaults, budgets=transformer.budgets, limits=config.limits)
        self.output = output_of(spec, decoded=True)

    def sample(self, requests: Sequence[Request], after_step: AfterStep) -> np.ndarray:
        if (budget := requests[0].settings.budget) is not None:
            self._transformer.budget = budget
        rows = [(str(prompt), seed) for request in requests for prompt, seed in request.rows]
        batches = [rows] if self._kind.batches else [[row] for row in rows]
        return np.concatenate([self._sample_batch(batch, requests[0].settings, after_step) for batch in batches])

    def _sample_batch(self, rows: Sequence[tuple[str, int]], settings: Settings, after_step: AfterStep) -> np.ndarray:
        prompts = Prompts(
            texts=tuple(text for text, _ in rows),
            seed=tuple(seed for _, seed in rows),
            steps=settings.steps,
            guidance=settings.guidance,
            height=settings.height,
            width=settings.width,
        )
        samples = sample_prompts(self._transformer, prompts, lambda _done, _total: after_step(), pipe=self._pipe)
        return to_bytes(samples.values)


def default_budget(transformer: BundleTransformer) -> float | None:
    """Return the budget of a request that names none; None for a bundle of one budget."""
    return transformer.budget if len(transformer.budgets) > 1 else None


def to_bytes(values: torch.Tensor) -> np.ndarray:
    """Convert pixels in [0, 1] to 8 bits, channels last: (B, ..., C, H, W) -> (B, ..., H, W, C)."""
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)
    return pixels.contiguous().cpu().numpy()
