"""Sampling of an evaluation, from class labels or from prompts: equal noise for every model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from dyexport.backbones import get_pipeline
from dyexport.backbones.sampling import PromptColumns
from dyexport.bench.sizes import Size, spec_at
from dyexport.bundle.spec import ModelSpec
from dyexport.evaluation.scores import as_pictures
from dyexport.evaluation.settings import EvalSettings, built_size
from dyexport.progress import Progress, no_progress
from dyexport.runtime.prompt_settings import Prompts, prompt_pipeline
from dyexport.runtime.prompts import open_pipeline, sample_prompts
from dyexport.runtime.sampling import Denoiser, Observer, decode, no_observer, open_vae, sample
from dyexport.runtime.transformer import BundleTransformer

Conditions = Literal["labels", "prompts", "random embeddings"]
Decoder = Callable[[torch.Tensor], torch.Tensor]

CHUNK = 300  # largest batch
CHUNK_TOKENS = 19_200  # of a batch: 300 digits of 64 tokens
SEED_STRIDE = 100_003  # between the seeds of two sample sets
TEXT_TOKENS = 8  # of a random prompt, where a model does not say


class Rows(NamedTuple):
    """Consecutive samples of a set: pixels in [0, 1], (B, C, H, W) or (B, F, C, H, W), or latents.

    ``labels`` (B,) are the classes, ``prompts`` the texts, where the model has them.
    """

    values: torch.Tensor
    pixels: bool
    labels: torch.Tensor | None = None
    prompts: Sequence[str] = ()


class Sampler(ABC):
    """Sampling of a set of samples, a batch at a time. The same rows and seed start from the same noise.

    ``settings`` are complete. ``size`` is height and width in pixels of models of prompts. ``decoder`` makes pictures
    of latents where there is a VAE that can be called alone.
    """

    conditions: ClassVar[Conditions]

    def __init__(self, spec: ModelSpec, settings: EvalSettings) -> None:
        assert settings.sampling.samples is not None, "the settings are complete"
        self.spec = spec
        self.settings = settings
        self.samples: int = settings.sampling.samples
        self.size: Size | None = None
        self.decoder: Decoder | None = None

    @property
    def batch(self) -> int:
        """Largest number of rows of one call: fewer of a model with many tokens."""
        return max(1, min(CHUNK, CHUNK_TOKENS // self.spec.tokens))

    @property
    def pictures(self) -> int:
        """Number of pictures, or frames of videos, of all samples."""
        return self.samples * (self.spec.frames or 1)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one picture or frame, (C, H, W): in pixels, or of latents."""

    @abstractmethod
    def __call__(
        self,
        transformer: Any,
        rows: range,
        seed: int,
        *,
        progress: Progress = no_progress,
        observe: Observer = no_observer,
    ) -> Rows:
        """Sample some rows of the set. ``observe`` is called with the latents after each step."""


def open_sampler(spec: ModelSpec, settings: EvalSettings) -> Sampler:
    """Make the sampler of a model. ``settings`` are complete. Raises ``CheckpointError`` for a VAE."""
    if get_pipeline(spec.backbone).takes == "labels":
        return LabelSampler(spec, settings)
    if settings.pipeline is None and not settings.prompts:
        return RandomPromptSampler(spec, settings)
    return PromptSampler(spec, settings)


class LabelSampler(Sampler):
    """Sampling from class labels. A VAE decodes latents; without one samples are latents, or pixels of some models."""

    conditions = "labels"

    def __init__(self, spec: ModelSpec, settings: EvalSettings) -> None:
        super().__init__(spec, settings)
        if settings.vae is not None:
            self._vae = open_vae(settings.vae)
            self.decoder = self._decode

    @property
    def shape(self) -> tuple[int, ...]:
        if self.decoder is None:
            return self.spec.latent_shape
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return (3, *(scale * side for side in self.spec.latent_shape[1:]))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode(self._vae.to(latents.device), latents)

    def __call__(
        self,
        transformer: Denoiser,
        rows: range,
        seed: int,
        *,
        progress: Progress = no_progress,
        observe: Observer = no_observer,
    ) -> Rows:
        config = self.settings.sampling
        labels = labels_of(self.spec, self.samples)[rows.start : rows.stop]  # (B,)
        values = sample(
            transformer,
            self.spec,
            labels,
            steps=config.steps,
            guidance_scale=config.guidance,
            scheduler=config.scheduler,
            seed=seed * SEED_STRIDE + rows.start,
            progress=progress,
            observe=observe,
        )  # (B, C, H, W)
        if self.decoder is not None:
            values = self.decoder(values)  # (B, 3, H, W)
        return Rows(values, pixels=self.decoder is not None or self.spec.pixel_space, labels=labels)


def labels_of(spec: ModelSpec, samples: int) -> torch.Tensor:
    """Return the classes of a sample set (n,): in turn, or evenly spaced where there are more classes than samples."""
    rows = torch.arange(samples)
    return rows % spec.classes if samples >= spec.classes else rows * spec.classes // samples


class _FromPrompts(Sampler):
    """Base of both samplers of models of prompts."""

    def __init__(self, spec: ModelSpec, settings: EvalSettings) -> None:
        super().__init__(spec, settings)
        self.size = settings.size or built_size(spec)
        self._kind = prompt_pipeline(spec)

    @property
    def batch(self) -> int:
        return self._kind.max_batch if self._kind.batches else 1

    def __call__(
        self,
        transformer: BundleTransformer,
        rows: range,
        seed: int,
        *,
        progress: Progress = no_progress,
        observe: Observer = no_observer,
    ) -> Rows:
        with self._chosen(rows, _seeds(rows, seed)) as prompts:
            result = sample_prompts(transformer, prompts, progress, pipe=self._around(transformer), observe=observe)
        return Rows(result.values, pixels=result.pixels, prompts=prompts.texts)

    @abstractmethod
    def _chosen(self, rows: range, seeds: tuple[int, ...]) -> AbstractContextManager[Prompts]:
        """Return the prompts of some rows, whose files exist inside the context."""

    def _around(self, transformer: BundleTransformer) -> Any:
        """Return the pipeline around a transformer, on its device; None to have one opened for the call."""
        return None

    def _prompts(self, seeds: tuple[int, ...], **source: Any) -> Prompts:
        assert self.size is not None, "models of prompts have sizes"
        sampling = self.settings.sampling
        return Prompts(
            steps=sampling.steps,
            guidance=sampling.guidance,
            height=self.size[0],
            width=self.size[1],
            seed=seeds,
            **source,
        )


class PromptSampler(_FromPrompts):
    """Sampling from texts, with the text encoders and the VAE of a diffusers pipeline, which is opened once."""

    conditions = "prompts"

    def __init__(self, spec: ModelSpec, settings: EvalSettings) -> None:
        super().__init__(spec, settings)
        self._texts = settings.prompts or PROMPTS
        self._source = settings.pipeline or self._kind.home(spec)
        self._prompts((0,), texts=self._texts[:1], pipeline=self._source).check_sources(spec)
        self._pipe: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.size is not None, "models of prompts have sizes"
        return (3, *self.size)

    @contextmanager
    def _chosen(self, rows: range, seeds: tuple[int, ...]) -> Iterator[Prompts]:
        texts = tuple(self._texts[row % len(self._texts)] for row in rows)
        yield self._prompts(seeds, texts=texts, pipeline=self._source)

    def _around(self, transformer: BundleTransformer) -> Any:
        if self._pipe is None:
            assert self._source is not None, "sources are checked"
            self._pipe = open_pipeline(transformer, self._source)
            self._pipe.set_progress_bar_config(disable=True)
            if transformer.device.type != "cpu":
                self._pipe.to(transformer.device)
        self._pipe.register_modules(transformer=transformer)
        return self._pipe


class RandomPromptSampler(_FromPrompts):
    """Sampling of latents from normal noise in the place of embedded prompts, which needs no text encoders."""

    conditions = "random embeddings"

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.size is not None, "models of prompts have sizes"
        latents = torch.empty(1, *spec_at(self.spec, self.size).latent_shape, device="meta")
        return tuple(as_pictures(latents, self.size[0] / self.size[1], pixels=False).shape[1:])

    @contextmanager
    def _chosen(self, rows: range, seeds: tuple[int, ...]) -> Iterator[Prompts]:
        from safetensors.torch import save_file

        with TemporaryDirectory() as folder:
            file = Path(folder) / "prompts.safetensors"
            prompts = self._prompts(seeds, embedded=file)
            save_file(self._embedded(prompts, seeds), file)
            yield prompts

    def _embedded(self, prompts: Prompts, seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        guidance = prompts.guidance_for(self.spec)
        columns = self._kind.columns(self.spec, guided=guidance is not None and guidance > 1)
        each = [_random_prompt(columns, self.spec.text_tokens or TEXT_TOKENS, seed) for seed in seeds]
        return {name: torch.stack([prompt[name] for prompt in each]) for name in columns}  # (B, ...)


def _seeds(rows: range, seed: int) -> tuple[int, ...]:
    """Return one seed for each row, so that a sample does not depend on its batch."""
    return tuple(seed * SEED_STRIDE + row for row in rows)


def _random_prompt(columns: PromptColumns, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Return tensors of one embedded prompt, normal noise; a mask lets all of it through."""
    generator = torch.Generator().manual_seed(seed)
    prompt = {}
    for name, shape in columns.items():
        sizes = [length if size is None else size for size in shape]
        masks = name.endswith("_mask")
        prompt[name] = torch.ones(sizes, dtype=torch.int64) if masks else torch.randn(sizes, generator=generator)
    return prompt


PROMPTS = (
    "a lighthouse at dusk, waves against the rocks",
    "a red bicycle leaning against a brick wall",
    "a bowl of ramen with a soft-boiled egg, seen from above",
    "a street market in the rain at night, neon signs",
    "a portrait of an old fisherman, black and white photograph",
    "a watercolor painting of a fox in the snow",
    "a steam train crossing a stone bridge in the mountains",
    'a wooden sign that reads "open" on a shop door',
)
"""Prompts of an evaluation, unless others are given."""
