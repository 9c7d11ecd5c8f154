"""One case of a benchmark: every variant at one batch and size, timed in the same rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from dyexport.bench.latency import Blocks, Clock, clock_of, seconds_of
from dyexport.bench.loops import loop_variant, switch_overhead
from dyexport.bench.rows import COMPILED, CONDITIONING, DENSE, EAGER, STOCK
from dyexport.bench.settings import BenchSettings
from dyexport.bench.sizes import spec_at
from dyexport.bench.variants import (
    DTYPES,
    Variant,
    conditioning_variant,
    dense_variant,
    segment_variants,
    stock_variant,
)
from dyexport.bundle.manifest import DENSE as DENSE_NETWORK
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.engines.registry import engine_files
from dyexport.progress import Progress, no_progress
from dyexport.runtime.loading import load
from dyexport.runtime.stock import stock_transformer
from dyexport.runtime.transformer import BundleTransformer

MOST_LOOPS = 5  # rounds of whole sampling loops
Key = tuple[str, str]  # target, variant


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A bundle on one target under the ``name`` of its variant, and its dense network where the bundle has one."""

    name: str
    loaded: BundleTransformer
    dense: BundleTransformer | None

    @property
    def whole(self) -> dict[str, BundleTransformer]:
        return {self.name: self.loaded} | ({} if self.dense is None else {DENSE: self.dense})


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that the variants of a case share."""

    bundle: Bundle
    settings: BenchSettings
    batch: int
    size: tuple[int, int] | None
    device: str
    opened: Mapping[str, Opened]

    @property
    def spec(self) -> ModelSpec:
        return spec_at(self.bundle.manifest.model, self.size)

    @property
    def steps(self) -> int:
        return self.settings.steps_for(self.bundle.manifest.model)

    @property
    def clock(self) -> Clock:
        return clock_of(self.device)

    @property
    def loops(self) -> Blocks:
        """Blocks of calls that take a whole trajectory."""
        return Blocks(rounds=min(self.settings.rounds, MOST_LOOPS), timed=1)


@contextmanager
def opened_case(bundle: Bundle, settings: BenchSettings, batch: int, size: tuple[int, int] | None) -> Iterator[Case]:
    """Open every target on one device, with no weights read yet; close them at the end."""
    device = settings.device
    opened = {}
    with ExitStack() as stack:
        for target in settings.targets:
            open_ = partial(load, bundle.root, target=target, check_hashes=False, fallback=False)
            loaded = open_(device=device, share_weights=settings.share_weights, memory=settings.memory)
            device = str(loaded.device)  # of the first target: the others are compared with it
            stack.enter_context(closing(loaded))
            dense = open_(device=device, dense=True) if has_dense(bundle, target) else None
            if dense is not None:
                stack.enter_context(closing(dense))
            opened[target] = Opened(name=bundle.manifest.widths, loaded=loaded, dense=dense)
        assert device is not None, "there is a target"
        yield Case(bundle=bundle, settings=settings, batch=batch, size=size, device=device, opened=opened)


def has_dense(bundle: Bundle, target: str) -> bool:
    """Return whether a bundle has its dense network in a target."""
    return DENSE_NETWORK in bundle.engine_paths(engine_files(target))


def step_variants(case: Case) -> dict[Key, Variant]:
    """Return the calls of one step, in the order in which sampling first makes them."""
    variants: dict[Key, Variant] = {}
    noise, data = case.spec.noise_to_data
    for target, opened in case.opened.items():
        segments = list(enumerate(segment_variants(opened.loaded, case.bundle, case.batch, case.spec)))
        for index, run in segments if noise < data else reversed(segments):
            variants[target, f"segment {index}"] = run
        variants[target, CONDITIONING] = conditioning_variant(opened.loaded, case.batch, case.steps)
        if opened.dense is not None:
            variants[target, DENSE] = dense_variant(opened.dense, case.spec, case.batch)
    return variants | _stock_variants(case)


def _stock_variants(case: Case) -> dict[Key, Variant]:
    settings, variants = case.settings, {}
    if settings.compiled or settings.eager:
        module = stock_transformer(case.spec)
        torch.nn.Module.to(module, case.device, DTYPES[case.spec.precision])  # diffusers' own method warns
        if settings.compiled:
            compiled = torch.compile(module, dynamic=False)
            variants[STOCK, COMPILED] = stock_variant(compiled, case.spec, case.batch, case.device)
        if settings.eager:
            variants[STOCK, EAGER] = stock_variant(module, case.spec, case.batch, case.device)
    return variants


def first_calls(variants: dict[Key, Variant], clock: Clock, progress: Progress = no_progress) -> dict[Key, float]:
    """Call every variant once, which loads its engine, and time that.

    Removes ``torch.compile`` from the variants if this machine cannot compile.
    """
    seconds = {}
    runs = list(variants.items())
    for done, (key, run) in enumerate(runs):
        progress(done, len(runs))
        try:
            seconds[key] = seconds_of(run, clock)
        except torch._inductor.exc.InductorError:
            del variants[key]
    return seconds


def loop_variants(case: Case) -> dict[Key, Variant]:
    """Return whole sampling loops of every target, dynamic and dense."""
    return {
        (target, name): loop_variant(transformer, case.spec, case.batch, case.steps)
        for target, opened in case.opened.items()
        for name, transformer in opened.whole.items()
    }


def overheads(case: Case) -> dict[str, float | None]:
    """Return the share of a step spent outside the engines, by target; None on a GPU, which runs asynchronously."""
    return {
        target: switch_overhead(opened.loaded, case.spec, case.batch, case.steps) if case.device == "cpu" else None
        for target, opened in case.opened.items()
    }
