"""Evaluation of a model while it is trained: losses and pictures, from the same samples and noise every time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dyexport.backbones.base import Adapter, Inputs, Preset
from dyexport.errors import CheckpointError, DataError, DyexportWarning
from dyexport.flops import FlopsModel
from dyexport.models.conditions import GRID, Conditions
from dyexport.models.dynamic import DynamicTransformer
from dyexport.training.data import LatentSource, random_rows
from dyexport.training.losses import DiffusionObjective, NoisyBatch, flops_ratio
from dyexport.training.metrics import of_budget
from dyexport.training.randomness import NoisyBatches, step_generator
from dyexport.training.sampling import Predict, new_denoiser, null_labels, sample_latents

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES = 64  # whose losses are averaged, at timesteps that are spread evenly
LABELS, PROMPTS = 10, 4  # samples of a picture; models of prompts are large
STEPS = 16  # denoising steps, at most
TILE, GAP = 64, 2  # pixels: a sample is enlarged to at least this size
ROWS, PICTURE, NOISE = 0, 1, 2  # of the stream of random numbers; NOISE and above are samples

Products = Callable[[], AbstractContextManager[None]]


class Decoder(Protocol):
    """Function from latents (B, *latent_shape) to pixels (B, C, H, W) in [-1, 1], on the CPU."""

    def open(self) -> None:
        """Raise ``CheckpointError`` or ``DataError`` if latents cannot be decoded."""

    def __call__(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of the evaluations of a run: ``every`` so many steps, at the start and at the end.

    ``source`` holds samples that are not trained on; None: those that are.
    """

    every: int
    source: LatentSource | None
    decoder: Decoder


class Networks(Protocol):
    """The networks of a model that is trained, under hard gates."""

    def metrics(self, batch: NoisyBatch) -> dict[str, Tensor]:
        """Return the metrics of each sample by name, each (B,)."""

    def predictors(self) -> Sequence[Predict]:
        """Return the networks that samples are made with, one for each budget."""


@dataclass(frozen=True, kw_only=True)
class StaticNetwork:
    """A stock backbone."""

    model: nn.Module
    adapter: Adapter
    objective: DiffusionObjective
    products: Products

    def metrics(self, batch: NoisyBatch) -> dict[str, Tensor]:
        return {"diffusion": self.objective.loss(self._predict(batch.inputs), batch.noised)}

    def predictors(self) -> Sequence[Predict]:
        return (self._predict,)

    def _predict(self, inputs: Inputs) -> Tensor:
        with self.products():
            return self.adapter.run(self.model, inputs).float()


@dataclass(frozen=True, kw_only=True)
class DynamicNetworks:
    """A dynamic model at each of its budgets, and, where ``complete``, the dense model that is trained with it."""

    model: DynamicTransformer
    objective: DiffusionObjective
    flops: FlopsModel
    products: Products
    complete: bool

    def metrics(self, batch: NoisyBatch) -> dict[str, Tensor]:
        metrics = {}
        for budget in self._budgets:
            with self._at(budget):
                output = self.model(batch.inputs)
            metrics[of_budget("diffusion", budget)] = self.objective.loss(output.sample, batch.noised)
            metrics[of_budget("flops_ratio", budget)] = flops_ratio(output, self.flops)
        if self.complete:
            with self.products():
                whole = self.model.forward_dense(batch.inputs)
            metrics["complete"] = self.objective.loss(whole, batch.noised)
        return metrics

    def predictors(self) -> Sequence[Predict]:
        return [partial(self._predict, budget) for budget in self._budgets]

    def _predict(self, budget: float | None, inputs: Inputs) -> Tensor:
        with self._at(budget):
            sample: Tensor = self.model(inputs).sample
        return sample.float()

    @property
    def _budgets(self) -> Sequence[float | None]:
        return self.model.budgets or (None,)

    @contextmanager
    def _at(self, budget: float | None) -> Iterator[None]:
        """Run the model at a budget inside the context."""
        before, self.model.budget = self.model.budget, budget
        try:
            with self.products():
                yield
        finally:
            self.model.budget = before


class Evaluation:
    """Evaluation of networks on fixed samples, of which each process takes a share.

    ``per_pass`` samples are run at a time. Only the main process makes pictures.
    """

    def __init__(self, batches: NoisyBatches, preset: Preset, settings: EvaluationSettings, per_pass: int) -> None:
        self.batches = replace(batches, source=settings.source or batches.source)
        self.preset = preset
        self.per_pass = per_pass
        self.samples = max(SAMPLES, batches.share.count)
        self.every = settings.every
        self._decoder: Decoder | None = settings.decoder

    def due(self, step: int, steps: int, evaluated: int) -> bool:
        """Tell whether an evaluation is due after ``step`` of ``steps``; the latest one was after ``evaluated``."""
        return step > evaluated and (step % self.every == 0 or step == steps)

    @torch.no_grad()
    def metrics(self, networks: Networks, reduced: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return means over all samples; ``reduced`` adds up a tensor over all processes."""
        share = self.batches.share
        rows = torch.arange(self.samples)[share.index :: share.count]
        parts = [networks.metrics(self._batch(part)) for part in _chunks(rows, self.per_pass)]
        names = list(parts[0])
        sums = torch.stack([torch.cat([part[name].double() for part in parts]).sum() for name in names])
        means = reduced(sums.float()) / self.samples
        return dict(zip(names, means.tolist(), strict=True))

    def _batch(self, rows: Tensor) -> NoisyBatch:
        """Return samples ``rows`` (B,) with their noise."""
        batches = self.batches
        generator = step_generator(batches.seed, ROWS, "evaluation")
        indices = random_rows(batches.source, self.samples, generator)[rows]
        uniform = (rows + 0.5) / self.samples  # (B,)
        clean, conditions = batches.source.batch(indices)
        generators = [step_generator(batches.seed, NOISE + row, "evaluation") for row in rows.tolist()]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=each) for each in generators])
        return batches.noisy(clean, conditions, noise, uniform)

    def picture(self, networks: Networks) -> Image | None:
        """Sample a picture: one row of samples for each budget, the same noise and conditions in each.

        None, after a warning, if latents of this model cannot be decoded, or if memory runs out.
        """
        if self._decoder is None:
            return None
        try:
            self._decoder.open()
            return self._sampled(networks, self._decoder)
        except (CheckpointError, DataError) as error:
            why = str(error)
        except torch.OutOfMemoryError:  # after which training goes on with what it has
            why = "the GPU has no memory left to sample and decode them; give a smaller --micro-batch to see them"
        self._decoder = None
        warnings.warn(f"evaluations have no pictures: {why}", DyexportWarning, stacklevel=2)
        return None

    def _sampled(self, networks: Networks, decoder: Decoder) -> Image:
        conditions = self._conditions()
        count = len(next(iter(conditions.values())))
        generator = step_generator(self.batches.seed, PICTURE, "evaluation")
        noise = torch.randn((count, *self.preset.latent_shape), generator=generator)
        rows = []
        for predict in networks.predictors():
            parts = [
                self._samples(predict, {name: values[part] for name, values in conditions.items()}, noise[part])
                for part in _chunks(torch.arange(count), self.per_pass)
            ]
            rows.append(decoder(torch.cat(parts)))
        return _picture(rows)

    def _samples(self, predict: Predict, conditions: Conditions, noise: Tensor) -> Tensor:
        """Sample latents. A model of prompts has no classifier-free guidance, since its empty prompt is not known."""
        default, device = self.preset.sampling, self.batches.device
        unconditional = null_labels(self.preset, conditions) if self.preset.classes else None
        denoise = new_denoiser(predict, self.preset, conditions, unconditional, default.guidance, device)
        return sample_latents(denoise, min(default.steps, STEPS), noise.to(device))

    def _conditions(self) -> Conditions:
        """Return class labels that are spread evenly, or the prompts of the first rows of the data."""
        preset = self.preset
        if preset.classes:
            count = min(LABELS, preset.classes)
            return {"class_labels": torch.arange(count) * preset.classes // count}
        rows = torch.arange(min(PROMPTS, len(self.batches.source)))
        embedded = [self.batches.source.batch(row).conditions for row in rows.split(1)]
        names = [name for name in embedded[0] if name != GRID]
        return {name: torch.cat([one[name] for one in embedded]) for name in names}


def _chunks(rows: Tensor, size: int) -> Sequence[Tensor]:
    return rows.split(max(size, 1))


def _picture(rows: Sequence[Tensor]) -> Image:
    """Lay out rows of pixels (B, C, H, W) in [-1, 1] in a grid, small ones enlarged."""
    from PIL import Image

    zoom = max(1, TILE // rows[0].shape[-1])
    tiles = torch.stack([(row.float() / 2 + 0.5).mul(255).round().to(torch.uint8) for row in rows])  # (R, B, C, H, W)
    tiles = tiles.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    tiles = nn.functional.pad(tiles, (0, GAP, 0, GAP), value=255)
    grid = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (R * H, B * W, C)
    colors = grid.expand(-1, -1, 3) if grid.shape[-1] == 1 else grid
    return Image.fromarray(colors[:-GAP, :-GAP].numpy())
