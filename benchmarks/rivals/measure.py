"""Training and scoring of all variants; everything that was made before is read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks.quality import (
    BUNDLE,
    STATIC,
    TRAINING,
    Family,
    Protocol,
    Samples,
    Scorer,
    Store,
    Trained,
    reported,
    train,
)
from benchmarks.rivals.cache_dit_network import (
    CacheDitNetwork,
    CacheSetting,
    Pilot,
    cached_step_cost,
    cost_of,
    fitted_setting,
)
from benchmarks.rivals.costs import (
    Composition,
    compiled_composition,
    dense_composition,
    eager_composition,
    flops_of,
    slim_composition,
)
from benchmarks.rivals.reuse import ReusingNetwork, threshold_for
from benchmarks.rivals.variants import CACHE_DIT, COMPILE, DENSE, DYNAMIC_REUSE, REUSE, Variant
from dyexport.bench.case import has_dense
from dyexport.bundle.reader import Bundle
from dyexport.console import StageLines
from dyexport.errors import UsageError
from dyexport.evaluation.paired import compare_samples
from dyexport.evaluation.samplers import labels_of
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import sample
from dyexport.stages.ledger import LEDGER

FORMAT = 1  # of scores; others are made again
FITTED = "threshold and limit"  # settings of cache-dit; earlier scores had another threshold
PILOT = 30  # samples, of noise that is in no score, to which thresholds are fitted
PILOT_SEED = 987_654_321
TARGET = "onnx"

Seeded = tuple[str, int | None]
"""Folder of a model, and the seed of its training."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One variant with one seed at one number of steps. ``frechet`` and ``class_accuracy`` have a value each repeat.

    ``psnr`` is to the dense model at the same steps, in decibels: None for the dense model itself, and where nothing
    differs. ``parts`` count the calls of what is timed.
    """

    variant: Variant
    seed: int | None
    steps: int
    cost: float
    parts: Mapping[str, float]
    frechet: tuple[float | None, ...] = ()
    class_accuracy: tuple[float | None, ...] = ()
    psnr: float | None = None


@dataclass
class Models:
    """Trained models by folder and seed, and sentences about those that are not."""

    static: Trained | None = None
    trained: dict[Seeded, Trained] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def bundles(self) -> dict[str, Bundle]:
        """Bundles by the name that their engines are timed under."""
        return {
            timed_name(*seeded): Bundle.open(model.path, check_hashes=False)
            for seeded, model in self.trained.items()
            if model.manifest is not None
        }

    def of(self, variant: Variant, seed: int | None) -> Trained | None:
        return self.static if variant.kind == STATIC else self.trained.get((variant.folder, seed))


def timed_name(folder: str, seed: int | None) -> str:
    """Return the name under which a model's engines are timed."""
    return folder if seed is None else f"{folder}-seed{seed}"


def train_all(
    family: Family, variants: Sequence[Variant], seeds: Sequence[int], lines: StageLines, *, training: bool
) -> Models:
    """Train every model that the variants need, or with ``training`` off open those that are there."""
    models = Models()
    models.static = _model(family.static, STATIC, lines, training, "the static model", models.missing)
    if models.static is None:
        return models
    wanted = {(each.folder, seed): each for each in variants for seed in each.seeds(seeds) if each.kind != STATIC}
    with reported(lines, "models") as advance:
        for done, ((folder, seed), variant) in enumerate(wanted.items()):
            name = f"{folder}, seed {seed}"
            advance(done, len(wanted), name)
            settings = variant.settings(family, models.static.path, seed or 0)
            found = _model(settings, variant.kind, lines, training, name, models.missing)
            if found is not None:
                models.trained[folder, seed] = found
    return models


def _model(
    settings: Any, kind: Any, lines: StageLines, training: bool, name: str, missing: list[str]
) -> Trained | None:
    if training:
        return train(settings, kind, lines)
    if not (settings.work / LEDGER).exists():
        missing.append(f"{name} is not trained")
        return None
    try:
        return train(settings, kind, lines, without=TRAINING)
    except UsageError as error:
        missing.append(f"{name} is not trained: {error}")
        return None


class Study:
    """Scores of all variants of one model under one protocol, kept in ``work``."""

    def __init__(self, family: Family, models: Models, protocol: Protocol, lines: StageLines) -> None:
        assert models.static is not None, "without it nothing is there"
        self._static = models.static
        self._models = models
        self._protocol = protocol
        self._lines = lines
        self._store = Store(family.work / "scores")
        self._samples = family.work / "samples"
        self._bundles = models.bundles
        self.spec = family.spec
        self.scorer = Scorer(self.spec)
        real = self.scorer.frechet_real
        self._judge = None if real is None else round(real, 5)  # differs where features do

    def points(self, variants: Sequence[Variant], seeds: Sequence[int], steps: Sequence[int]) -> list[Point]:
        """Score every variant with every seed at every number of steps."""
        budgets = sorted({each.budget for each in variants if each.budget is not None})
        jobs = [
            (variant, seed, [count for count in variant.steps(steps, budgets) if _applies(variant, count)])
            for variant in variants
            for seed in variant.seeds(seeds)
            if self._models.of(variant, seed) is not None
        ]
        self._left = self._total = sum(self._work(*job) for job in jobs)
        with reported(self._lines, "scores") as self._advance:
            return [point for variant, seed, counts in jobs for point in self._points(variant, seed, counts)]

    def _work(self, variant: Variant, seed: int | None, counts: Sequence[int]) -> int:
        """Return the denoising steps of all samples that are not scored yet."""
        if variant.name == COMPILE:
            return 0
        return sum(self._amount(steps) for steps in counts if self._key(variant, seed, steps) not in self._store)

    def _amount(self, steps: int) -> int:
        return steps * (self._protocol.sampling.samples or 0) * self._protocol.repeats

    def _key(self, variant: Variant, seed: int | None, steps: int) -> str:
        model = self._models.of(variant, seed)
        assert model is not None, "jobs are of models that are there"
        cached = [variant.name, variant.share] if variant.share is not None else []
        if variant.name == CACHE_DIT:
            cached.append(FITTED)
        return self._protocol.at(steps).key(FORMAT, self._judge, model.digest, self._static.digest, cached)

    def _points(self, variant: Variant, seed: int | None, counts: Sequence[int]) -> Iterator[Point]:
        with self._opened(variant, seed) as network:
            for steps in counts:
                if variant.name == COMPILE:
                    composed, scores = compiled_composition(steps), {}
                else:
                    key = self._key(variant, seed, steps)
                    scores = self._store.read(key, partial(self._scored, network, variant, seed, steps))
                    composed = self._composition(variant, seed, scores["shares"])
                yield Point(
                    variant=variant,
                    seed=seed,
                    steps=steps,
                    cost=composed.cost,
                    parts=composed.parts,
                    frechet=tuple(scores.get("frechet", ())),
                    class_accuracy=tuple(scores.get("class_accuracy", ())),
                    psnr=scores.get("psnr"),
                )

    @contextmanager
    def _opened(self, variant: Variant, seed: int | None) -> Iterator[Any]:
        """Yield a function that opens the network at its first call."""
        opened: list[Any] = []

        def network() -> Any:
            if not opened:
                opened.append(self._open(variant, seed))
            return opened[0]

        yield network
        for each in opened:
            if hasattr(each, "close"):
                each.close()

    def _open(self, variant: Variant, seed: int | None) -> Any:
        model = self._models.of(variant, seed)
        assert model is not None, "jobs are of models that are there"
        if variant.name in (DENSE, REUSE):
            dense = next((bundle for bundle in self._bundles.values() if has_dense(bundle, TARGET)), None)
            if dense is not None:
                return load(dense.root, device="cpu", check_hashes=False, dense=True)
        return model.open(self.spec)

    def _scored(self, network: Callable[[], Any], variant: Variant, seed: int | None, steps: int) -> dict[str, Any]:
        cached = self._with_cache(network(), variant, steps)
        protocol = self._protocol.at(steps)
        before, amount = self._total - self._left, self._amount(steps)
        detail = f"{variant.label}{'' if seed is None else f', seed {seed}'}, {steps} steps"

        def progress(done: int, total: int) -> None:
            self._advance(before + amount * done // total, self._total, detail)

        scores, samples = self.scorer(cached, protocol, progress)
        self._left -= amount
        file = self._samples / f"{self._key(Variant(name=DENSE), None, steps)[:24]}.npy"
        psnr = None
        if variant.name == DENSE:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, samples.samples().numpy())
        else:
            dense = Samples.of(torch.from_numpy(np.load(file)), self.spec)
            psnr = compare_samples(samples, dense).psnr
        return {
            "what": detail,
            "shares": getattr(cached, "shares", [1.0] * steps),
            "frechet": [each.frechet for each in scores.seeds],
            "class_accuracy": [each.class_accuracy for each in scores.seeds],
            "psnr": psnr,
        }

    def _with_cache(self, network: Any, variant: Variant, steps: int) -> Any:
        """Put the variant's cache around a network, its threshold fitted to a few samples."""
        if variant.share is None:
            return network
        if variant.name in (REUSE, DYNAMIC_REUSE):
            pilot = ReusingNetwork(network, steps, threshold=0.0)
            self._pilot(pilot, steps)
            return ReusingNetwork(network, steps, threshold_for(pilot.changes, variant.share))
        return CacheDitNetwork(network, steps, self._fitted(network, steps, variant.share))

    def _fitted(self, network: Any, steps: int, share: float) -> CacheSetting:
        """Fit cache-dit to a few samples: the error is that to samples without a cache."""
        cached = cached_step_cost(flops_of(self.spec))
        whole = self._pilot(CacheDitNetwork(network, steps, CacheSetting(threshold=0.0)), steps)

        @cache
        def pilot(setting: CacheSetting) -> Pilot:
            caching = CacheDitNetwork(network, steps, setting)
            samples = self._pilot(caching, steps)
            return Pilot(cost_of(caching.shares, cached), float((samples - whole).square().mean()))

        return fitted_setting(pilot, share * steps)

    def _pilot(self, network: Any, steps: int) -> torch.Tensor:
        """Sample a few pictures or latents."""
        sampling = self._protocol.sampling
        return sample(
            network,
            self.spec,
            labels_of(self.spec, max(PILOT, self.spec.classes)),
            steps=steps,
            guidance_scale=sampling.guidance,
            scheduler=sampling.scheduler,
            seed=PILOT_SEED,
        )

    def _composition(self, variant: Variant, seed: int | None, shares: Sequence[float]) -> Composition:
        if variant.name == CACHE_DIT:
            return eager_composition(self.spec, shares)
        if variant.kind == BUNDLE:
            name = timed_name(variant.folder, seed)
            return slim_composition(name, self._bundles[name], shares)
        return dense_composition(shares)


def _applies(variant: Variant, steps: int) -> bool:
    """Return whether a cache leaves anything out at so few steps: the rule computes the first and the last."""
    return variant.share is None or steps > 2
