"""From orders to pixels: what a server holds open between requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dyexport.backbones import get_pipeline
from dyexport.runtime.loading import load
from dyexport.runtime.prompts import Prompts, draw_prompts, open_pipeline
from dyexport.runtime.sampling import LABEL_DEFAULTS, decode, open_vae, sample
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
    if transformer.spec.classes:
        vae = None if served.vae is None else open_vae(source_of(folder, served.vae)).to(transformer.device)
        return LabelSampler(transformer, served, vae)
    assert served.pipeline is not None, "deploy asks for it"
    return PromptSampler(transformer, served, source_of(folder, served.pipeline))


class LabelSampler:
    """DiT and SiT: a picture for each class label."""

    def __init__(self, transformer: BundleTransformer, served: ServedModelConfig, vae: torch.nn.Module | None) -> None:
        spec = transformer.spec
        usual = Settings(steps=min(LABEL_DEFAULTS.steps, served.max_steps), guidance=LABEL_DEFAULTS.guidance)
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
    """FLUX and Latte: a picture or a video for each prompt, by diffusers' own pipeline."""

    def __init__(self, transformer: BundleTransformer, served: ServedModelConfig, pipeline: str) -> None:
        spec = transformer.spec
        self._kind = get_pipeline(spec.backbone)
        self._transformer = transformer
        self._pipe = open_pipeline(transformer, pipeline).to(transformer.device)
        self._pipe.set_progress_bar_config(disable=True)
        habits, side = self._kind.defaults(spec), self._kind.side(spec, self._pipe.vae_scale_factor)
        usual = Settings(steps=min(habits.steps, served.max_steps), guidance=habits.guidance, height=side, width=side)
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
        drawn = draw_prompts(self._transformer, wanted, lambda _done, _all: after_step(), pipe=self._pipe)
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
