"""Times of all engines in alternating blocks of one run, and the memory of each variant's engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from benchmarks.rivals.cache_dit_network import CacheDitNetwork, CacheSetting, is_installed, supports
from benchmarks.rivals.costs import (
    CACHED,
    COMPILED,
    DENSE,
    DIFFUSERS,
    EAGER,
    REUSED,
    STEP,
    conditioning,
    part,
)
from benchmarks.rivals.reuse import ReusingNetwork
from dyexport.bench.case import Key, first_calls, has_dense
from dyexport.bench.case_rows import segment_variant
from dyexport.bench.latency import Blocks, clock_of, time_rounds
from dyexport.bench.machine import cpu_time, taken_by_others
from dyexport.bench.memory import MemoryProbe, measure_memory
from dyexport.bench.statistics import Ratio, Timing, ratio
from dyexport.bench.variants import (
    DTYPES,
    Variant,
    conditioning_variant,
    dense_variant,
    module_variant,
    segment_variants,
    stock_variant,
)
from dyexport.bundle.reader import Bundle
from dyexport.errors import UsageError
from dyexport.progress import Progress, no_progress
from dyexport.runtime.loading import load
from dyexport.runtime.stock import example_inputs, stock_transformer
from dyexport.runtime.transformer import BundleTransformer

TARGET = "onnx"
MANY_STEPS = 1_000_000  # of a trajectory under cache-dit whose steps after the first are all cached


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """Timed calls: pictures of one, rounds of alternating blocks, and whether torch.compile is timed."""

    batch: int = 64
    rounds: int = 10
    compiled: bool = True


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of each part, all timed in the same rounds, and the share of CPU time that other processes took."""

    batch: int
    parts: Mapping[str, Timing]
    others: float | None

    def over_dense(self, parts: Sequence[Mapping[str, float]], steps: int) -> Ratio | None:
        """Return the time of a trajectory in steps of the dense engine, which include their share of conditioning.

        ``parts`` count the calls, once for each training seed; the mean of these is timed. None if one was not timed.
        """
        if any(name not in self.parts for each in parts for name in each):
            return None
        unit = self.parts[part(DENSE, STEP)] + self.parts[part(DENSE, conditioning(steps))] * (1 / steps)
        calls = [self.parts[name] * (count / len(parts)) for each in parts for name, count in each.items() if count]
        return ratio(reduce(add, calls), unit)


def time_engines(
    bundles: Mapping[str, Bundle],
    steps: Sequence[int],
    needed: Collection[str],
    settings: TimingSettings,
    progress: Progress = no_progress,
) -> Timings:
    """Time the engines of bundles, of the dense network, and diffusers' module with random weights.

    Only the parts that are ``needed`` are timed, and the dense engine. Conditioning is of all steps of a trajectory at
    once. Raises ``UsageError`` if no bundle has the dense network.
    """
    dense = next((bundle for bundle in bundles.values() if has_dense(bundle, TARGET)), None)
    if dense is None:
        raise UsageError("no bundle has the dense network that times are compared with; build one with --baseline")
    clock, batch = clock_of("cpu"), settings.batch
    with ExitStack() as stack, torch.inference_mode():
        variants: dict[Key, Variant] = {}
        loaded = stack.enter_context(closing(_load(dense, dense=True)))
        variants |= _dense_variants(loaded, dense, batch, steps)
        for name, bundle in bundles.items():
            opened = stack.enter_context(closing(_load(bundle)))
            calls = segment_variants(opened, bundle, batch)
            variants |= {(name, segment_variant(index)): call for index, call in enumerate(calls)}
            variants |= _conditioning_variants(name, opened, batch, steps)
        variants |= _module_variants(dense, settings)
        wanted = {part(DENSE, STEP), *(part(DENSE, conditioning(count)) for count in steps), *needed}
        variants = {key: call for key, call in variants.items() if part(*key) in wanted}
        first_calls(variants, clock)
        before = cpu_time()
        timings = time_rounds(variants, Blocks(rounds=settings.rounds), clock=clock, progress=progress)
        others = taken_by_others(before, cpu_time())
    return Timings(batch=batch, parts={part(*key): timing for key, timing in timings.items()}, others=others)


def _load(bundle: Bundle, *, dense: bool = False) -> BundleTransformer:
    return load(bundle.root, target=TARGET, device="cpu", check_hashes=False, dense=dense, fallback=False)


def _dense_variants(loaded: BundleTransformer, bundle: Bundle, batch: int, steps: Sequence[int]) -> dict[Key, Variant]:
    spec = bundle.manifest.model
    inputs = example_inputs(spec, batch, sum(spec.timestep_range) / 2)
    reusing = ReusingNetwork(loaded, MANY_STEPS, threshold=float("inf"))  # computes the first call alone
    return {
        (DENSE, STEP): dense_variant(loaded, spec, batch),
        (DENSE, REUSED): module_variant(reusing, inputs),
        **_conditioning_variants(DENSE, loaded, batch, steps),
    }


def _conditioning_variants(
    name: str, loaded: BundleTransformer, batch: int, steps: Sequence[int]
) -> dict[Key, Variant]:
    return {(name, conditioning(count)): conditioning_variant(loaded, batch, count) for count in steps}


def _module_variants(bundle: Bundle, settings: TimingSettings) -> dict[Key, Variant]:
    spec, batch = bundle.manifest.model, settings.batch
    module = torch.nn.Module.to(stock_transformer(spec), dtype=DTYPES[spec.precision])
    variants: dict[Key, Variant] = {(DIFFUSERS, EAGER): stock_variant(module, spec, batch, "cpu")}
    if settings.compiled:
        variants[DIFFUSERS, COMPILED] = stock_variant(torch.compile(module, dynamic=False), spec, batch, "cpu")
    if is_installed() and supports(spec):
        module = torch.nn.Module.to(stock_transformer(spec), dtype=DTYPES[spec.precision])
        cached = CacheDitNetwork(module, MANY_STEPS, CacheSetting(threshold=1e9), warmup=0)
        variants[DIFFUSERS, CACHED] = stock_variant(cached, spec, batch, "cpu")
    return variants


def resident_bytes(bundle: Bundle, batch: int, *, dense: bool) -> int | None:
    """Return what a fresh process grows by when each engine has run once; None if the system cannot tell."""
    probe = MemoryProbe(
        bundle=str(bundle.root),
        target=TARGET,
        batch=batch,
        threads=torch.get_num_threads(),
        share_weights=False,
        dense=dense,
    )
    return measure_memory(probe).resident_bytes
