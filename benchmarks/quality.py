"""Models that are trained from one static model, and their scores: what the benchmarks of quality share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import torch

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.spec import ModelSpec
from dyexport.evaluation.data_sets import data_set_of
from dyexport.evaluation.evaluate import score_model
from dyexport.evaluation.judges import Judges, built_in_judges, real_distance
from dyexport.evaluation.paired import Trail
from dyexport.evaluation.report import ModelScores
from dyexport.evaluation.samplers import Rows, open_sampler
from dyexport.evaluation.settings import EvalSettings, SamplingConfig
from dyexport.files import write_atomically
from dyexport.pipeline.build import build_bundle, make_static_model, opened, train_control
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import get_preset
from dyexport.progress import Progress, no_progress
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import Denoiser, Observer, no_observer
from dyexport.runtime.stock import stock_class
from dyexport.slicing.slicer import spec_of
from dyexport.stages.file_records import digest_of
from dyexport.stages.ledger import BuildListener

Kind = Literal["static", "control", "bundle"]
"""A static model, one that was trained on for as long as the others, or a model with slim engines."""

STATIC: Kind = "static"
CONTROL: Kind = "control"
BUNDLE: Kind = "bundle"
TRAINING = frozenset({"static", "synthetic", "dynamic", "control"})  # stages


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that are trained from one static model, each in a folder of ``work``.

    budget          FLOPs ratio of those that do not have another one
    train_steps     of the static model; None: its recipe's
    finetune_steps  of all others; None: the recipe's
    engines         of a dynamic model
    baseline        True if bundles also have the dense network
    """

    model: str
    work: Path
    budget: float = 0.5
    train_steps: int | None = None
    finetune_steps: int | None = None
    engines: int = 4
    baseline: bool = False

    @property
    def spec(self) -> ModelSpec:
        preset = get_preset(self.model)
        return spec_of(preset, preset.transformer_config())

    @property
    def static(self) -> BuildSettings:
        """Settings of the static model."""
        return BuildSettings(
            model=self.model,
            budget=self.budget,
            out=self.work / STATIC,
            work=self.work / f"{STATIC}.work",
            train_steps=self.train_steps,
            finetune_steps=self.finetune_steps,
            engines=self.engines,
            baseline=self.baseline,
        )

    def tuned(self, name: str, static: Path, seed: int, **changes: Any) -> BuildSettings:
        """Return the settings of a model that is trained from the static one."""
        out = self.work / f"{name}-seed{seed}"
        work = out.with_name(f"{out.name}.work")
        values = {"checkpoint": str(static), "train_steps": None, "seed": seed, **changes}
        return replace(self.static, out=out, work=work, **values)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that is there: its files, a digest of them, and its manifest if it is a bundle."""

    path: Path
    digest: str
    manifest: Manifest | None = None

    def open(self, spec: ModelSpec) -> Any:
        """Load the network."""
        if self.manifest is not None:
            return load(self.path, check_hashes=False)
        network = stock_class(spec).from_pretrained(self.path).eval()
        network.spec = spec  # as a bundle's transformer has it
        return network


def train(
    settings: BuildSettings, kind: Kind, listener: BuildListener, *, without: frozenset[str] = frozenset()
) -> Trained:
    """Train a model, or go on where that stopped. Raises ``UsageError`` if it needs a stage named in ``without``."""
    with opened(settings, listener, without=without) as run:
        if kind == BUNDLE:
            manifest = build_bundle(run)
            files = {name: record.sha256 for name, record in manifest.files.items()}
            return Trained(path=settings.out, digest=digest_of(files), manifest=manifest)
        outcome = make_static_model(run).static if kind == STATIC else train_control(run)
        return Trained(path=outcome.path, digest=outcome.digest)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Evaluation of every model: ``repeats`` times from different noise. The field names are keys of the results."""

    sampling: SamplingConfig
    repeats: int

    def at(self, steps: int) -> Protocol:
        """Return the protocol at another number of steps."""
        return replace(self, sampling=replace(self.sampling, steps=steps))

    def key(self, *identity: Any) -> str:
        """Return a key of the scores of what ``identity`` identifies."""
        return digest_of([*identity, asdict(self.sampling), self.repeats])


class Samples(Trail):
    """The first samples of a network, without the latents along the way."""

    def next(self) -> Observer:
        return no_observer

    @classmethod
    def of(cls, values: torch.Tensor, spec: ModelSpec) -> Samples:
        return cls(rows=[Rows(values, pixels=spec.pixel_space)])


class Scorer:
    """Scores of networks of one model, from the same noise and labels, by the features of its built-in data set.

    A model without one has no scores but its samples.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    @cached_property
    def _judges(self) -> Judges:
        name = data_set_of(self.spec)
        return Judges() if name is None else built_in_judges(name)

    @property
    def frechet_real(self) -> float | None:
        """Distance of held-out real pictures; None where there are none."""
        return real_distance(EvalSettings().complete(self.spec), self._judges)

    def __call__(
        self, network: Denoiser, protocol: Protocol, progress: Progress = no_progress
    ) -> tuple[ModelScores, Samples]:
        """Sample and score a network; also return its first samples."""
        sampler = open_sampler(self.spec, EvalSettings(sampling=protocol.sampling).complete(self.spec))
        samples = Samples()
        scores = score_model(network, sampler, self._judges, range(protocol.repeats), progress, samples)
        return ModelScores.of("", scores), samples


@contextmanager
def reported(lines: BuildListener, stage: str) -> Iterator[Callable[..., None]]:
    """Report a stage; yields the function that takes what is done, the total, and a detail."""
    begin = monotonic()
    lines.started(stage, "")
    yield partial(lines.advanced, stage)
    lines.finished(stage, monotonic() - begin, reused=False)


@dataclass(frozen=True)
class Store:
    """JSON values that took long to compute, in files that are named by a key."""

    folder: Path

    def path(self, key: str) -> Path:
        return self.folder / f"{key[:24]}.json"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Read a value back, or make and keep it."""
        if key not in self:
            write_atomically(self.path(key), (json.dumps(make(), indent=1) + "\n").encode())
        value: dict[str, Any] = json.loads(self.path(key).read_text())
        return value


def scores_by_steps(
    trained: Trained,
    spec: ModelSpec,
    scorer: Scorer,
    protocol: Protocol,
    steps: Sequence[int],
    store: Store,
    lines: BuildListener,
) -> dict[str, Any]:
    """Return the scores of a model at each number of steps, as JSON values; those that the store has are not made."""
    scores = {}
    for count in steps:
        at = protocol.at(count)

        def make(at: Protocol = at) -> Mapping[str, Any]:
            with reported(lines, "eval") as progress:
                return asdict(scorer(trained.open(spec), at, progress)[0])

        scores[str(count)] = store.read(at.key(trained.digest), make)
    return scores


def write_results(file: Path, value: Mapping[str, Any], markdown: str) -> None:
    """Write results as JSON, and a table next to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(value, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown.encode())


def default_train_steps(model: str) -> int | None:
    """Return the steps of training from scratch in a model's recipe."""
    schedule = get_preset(model).recipe.from_scratch
    return None if schedule is None else schedule.steps
