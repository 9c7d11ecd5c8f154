"""From orders to pixels: what a server holds open between requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dyexport.backbones import get_pipeline, sampling_defaults
from dyexport.runtime.loading import load
from dyexport.runtime.prompts import Prompts, open_pipeline, prompt_pipeline, sample_prompts
from dyexport.runtime.sampling import decode, open_vae, sample
from dyexport.runtime.transformer import BundleTransformer
from dyexport.serving.config import BUNDLE, Output, ServedModelConfig, output_of, source_of
from dyexport.serving.requests import Request, RequestParser, Settings

AfterStep = Callable[[], None]
"""Called after each denoising step; what it raises ends the drawing."""


class Sampler(Protocol):
    """Draws batches of one model."""

    book: RequestParser
    output: Output

    def draw(self, orders: Sequence[Request], after_step: AfterStep) -> np.ndarray:
        """Samples of all orders, which share their settings, in one batch: (B, ...), as ``output`` says."""


def open_sampler(folder: Path, served: ServedModelConfig, device: str | None) -> Sampler:
    """The model in a version folder of a repository. Raises what ``load`` raises, and ``CheckpointError``.

    Engines that do not fit this machine are an error: a server that is ready runs what it was deployed for.
    """
    transformer = load(
        folder / BUNDLE,
        target=served.target,
        device=device,
        memory=served.memory,
        share_weights=served.share_weights,
        fallback=False,
    )
    if get_pipeline(transformer.spec.backbone).takes == "labels":
        vae = None if served.vae is None else open_vae(source_of(folder, served.vae)).to(transformer.device)
        return LabelSampler(transformer, served, vae)
    assert served.pipeline is not None, "deploy asks for it"
    return PromptSampler(transformer, served, source_of(folder, served.pipeline))


class LabelSampler:
    """Samples one picture per class label."""

    def __init__(self, transformer: BundleTransformer, served: ServedModelConfig, vae: torch.nn.Module | None) -> None:
        spec = transformer.spec
        default = sampling_defaults(spec)
        usual = Settings(steps=min(default.steps, served.max_steps), guidance=default.guidance)
        self.book = RequestParser(classes=spec.classes, usual=usual, limits=served.limits)
        self.output = output_of(spec, decoded=spec.pixel_space or vae is not None)
        self._transformer, self._vae, self._scheduler = transformer, vae, served.scheduler

    def draw(self, orders: Sequence[Request], after_step: AfterStep) -> np.ndarray:
        settings, rows = orders[0].settings, [row for order in orders for row in order.rows]
        values = sample(
            _Watched(self._transformer, after_step),
            self._transformer.spec,
            [int(label) for label, _ in rows],
            steps=settings.steps,
            scheduler=self._scheduler,
            guidance_scale=settings.guidance,
            seed=[seed for _, seed in rows],
        )  # (B, C, H, W)
        if self._vae is not None:
            values = decode(self._vae, values)
        return values.cpu().numpy() if self.output.name == "latents" else bytes_of(values)


class PromptSampler:
    """Samples one picture or video per prompt, by the model's diffusers pipeline."""

    def __init__(self, transformer: BundleTransformer, served: ServedModelConfig, pipeline: str) -> None:
        spec = transformer.spec
        self._kind = prompt_pipeline(spec)
        self._transformer = transformer
        self._pipe = open_pipeline(transformer, pipeline).to(transformer.device)
        self._pipe.set_progress_bar_config(disable=True)
        default, side = self._kind.defaults(spec), self._kind.side(spec, self._pipe.vae_scale_factor)
        steps = min(default.steps, served.max_steps)
        usual = Settings(steps=steps, guidance=default.guidance, height=side, width=side)
        self.book = RequestParser(classes=0, usual=usual, limits=served.limits)
        self.output = output_of(spec, decoded=True)

    def draw(self, orders: Sequence[Request], after_step: AfterStep) -> np.ndarray:
        subjects = [(str(subject), seed) for order in orders for subject, seed in order.rows]
        parts = [subjects] if self._kind.batches else [[each] for each in subjects]
        return np.concatenate([self._drawn(part, orders[0].settings, after_step) for part in parts])

    def _drawn(self, subjects: Sequence[tuple[str, int]], settings: Settings, after_step: AfterStep) -> np.ndarray:
        wanted = Prompts(
            texts=tuple(text for text, _ in subjects),
            seed=tuple(seed for _, seed in subjects),
            steps=settings.steps,
            guidance=settings.guidance,
            height=settings.height,
            width=settings.width,
        )
        drawn = sample_prompts(self._transformer, wanted, lambda _done, _all: after_step(), pipe=self._pipe)
        return bytes_of(drawn.values)


def bytes_of(values: torch.Tensor) -> np.ndarray:
    """Pixels in [0, 1] to 8 bits, colours last: (B, ..., C, H, W) -> (B, ..., H, W, C)."""
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)
    return pixels.contiguous().cpu().numpy()


class _Watched:
    """A transformer that says when it was called: once a step."""

    def __init__(self, transformer: BundleTransformer, after_step: AfterStep) -> None:
        self.device = transformer.device
        self._transformer, self._after_step = transformer, after_step

    def __call__(self, **inputs: Any) -> Any:
        output = self._transformer(**inputs)
        self._after_step()
        return output
