"""Compare a bundle with its dense graph and the dense diffusers module, all timed in one run (``dyexport bench``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from statistics import median

import numpy as np
import torch

from dyexport.bench.latency import BenchReport, Blocks, SegmentTime, over_trajectory, time_variants
from dyexport.bench.machine import cpu_time, taken_by_others
from dyexport.bench.memory import MemoryProbe, added_bytes
from dyexport.bench.settings import BenchSettings
from dyexport.bench.variants import (
    Variant,
    compiled_variant,
    conditioning_variant,
    module_variant,
    segment_variants,
)
from dyexport.bundle.plan import Segment, SegmentPlan
from dyexport.bundle.reader import Bundle
from dyexport.progress import Progress
from dyexport.runtime.loading import load
from dyexport.runtime.stock import example_inputs, stock_transformer
from dyexport.runtime.transformer import BundleTransformer

OVERHEAD_LOOPS = 3
LOOP_BLOCKS = Blocks(rounds=3, timed=1)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    seconds: Mapping[str, float]
    others: float | None
    switch_overhead: float
    trajectory_speedup: float | None


def compare(bundle: Bundle, settings: BenchSettings, progress: Progress | None = None) -> BenchReport:
    """Measure latency, overhead and memory. Raises ``UsageError`` for a bundle without its dense graph."""
    settings.check_for(bundle)
    with _threads(settings.threads), torch.inference_mode():
        return _report(bundle, settings, _measure(bundle, settings, progress))


def _measure(bundle: Bundle, settings: BenchSettings, progress: Progress | None) -> _Measured:
    open_ = partial(load, bundle.root, target=settings.target, device="cpu", check_hashes=False, fallback=False)
    dense, loaded = open_(dense=True), open_(share_weights=settings.share_weights, memory=settings.memory)
    variants = _variants(bundle, dense, loaded, settings)
    before = cpu_time()
    seconds = time_variants(variants, Blocks(rounds=settings.rounds), progress=progress)
    measured = _Measured(
        seconds=seconds,
        others=taken_by_others(before, cpu_time()),
        switch_overhead=switch_overhead(loaded, settings),
        trajectory_speedup=_trajectory_speedup(dense, loaded, settings) if settings.trajectory else None,
    )
    loaded.close()
    dense.close()
    return measured


def _variants(
    bundle: Bundle, dense: BundleTransformer, loaded: BundleTransformer, settings: BenchSettings
) -> dict[str, Variant]:
    spec = bundle.manifest.model
    start, end = spec.timestep_range
    inputs = example_inputs(spec, settings.batch, (start + end) / 2)
    stock = stock_transformer(spec)
    variants = {
        "dense": module_variant(dense, inputs, "cpu"),
        "conditioning": conditioning_variant(loaded, settings.batch, settings.steps_for(loaded.spec)),
    }
    variants |= {f"segment {i}": run for i, run in enumerate(segment_variants(loaded, bundle, settings.batch))}
    if settings.compiled and (compiled := compiled_variant(stock, inputs, "cpu")) is not None:
        variants["torch.compile"] = compiled
    return {**variants, "eager": module_variant(stock, inputs, "cpu")}


def _report(bundle: Bundle, settings: BenchSettings, measured: _Measured) -> BenchReport:
    plan, seconds = bundle.manifest.plan, with_conditioning(measured.seconds, settings.steps_for(bundle.manifest.model))
    segments = _segment_times(plan, bundle, seconds)
    dynamic = over_trajectory([s.share for s in segments], [s.seconds for s in segments])
    speedup = seconds["dense"] / dynamic
    compiled = seconds.get("torch.compile")
    whole_networks = {name: value for name, value in seconds.items() if not name.startswith("segment")}
    return BenchReport(
        model=bundle.manifest.model.name,
        target=settings.target,
        batch=settings.batch,
        threads=torch.get_num_threads(),
        steps=settings.steps_for(bundle.manifest.model),
        flops_ratio=plan.flops_ratio,
        network_flops_ratio=plan.network_flops_ratio,
        executed_flops_ratio=plan.executed_flops_ratio,
        seconds={**whole_networks, "dynamic": dynamic},
        speedup_vs_dense=speedup,
        speedup_vs_torch_compile=None if compiled is None else compiled / dynamic,
        speedup_vs_eager=seconds["eager"] / dynamic,
        realized=speedup * plan.network_flops_ratio,
        switch_overhead=measured.switch_overhead,
        trajectory_speedup=measured.trajectory_speedup,
        others=measured.others,
        resident_bytes=_added_bytes(bundle, settings, dense=False),
        dense_bytes=_added_bytes(bundle, settings, dense=True),
        segments=segments,
    )


def with_conditioning(seconds: Mapping[str, float], steps: int) -> dict[str, float]:
    """Return seconds per step. The conditioning network runs once; each step gets an equal share of its time."""
    once = seconds["conditioning"] / steps
    shared = {name for name in seconds if name == "dense" or name.startswith("segment")}
    per_step = {name: value + once if name in shared else value for name, value in seconds.items()}
    return {**per_step, "conditioning": once}


def _added_bytes(bundle: Bundle, settings: BenchSettings, *, dense: bool) -> int | None:
    return added_bytes(
        MemoryProbe(
            bundle=str(bundle.root),
            target=settings.target,
            batch=settings.batch,
            threads=torch.get_num_threads(),
            share_weights=settings.share_weights,
            memory=None if dense else settings.memory,
            dense=dense,
        )
    )


def _segment_times(plan: SegmentPlan, bundle: Bundle, seconds: Mapping[str, float]) -> tuple[SegmentTime, ...]:
    widths = bundle.widths
    return tuple(
        SegmentTime(
            start=segment.start,
            end=segment.end,
            share=(segment.end - segment.start) / (widths.end - widths.start),
            heads=_mean_share(segment.heads, widths.heads.shape[-1]),
            groups=_mean_share(segment.groups, widths.groups.shape[-1]),
            tokens=_kept_tokens(bundle, segment),
            seconds=seconds[f"segment {index}"],
            speedup_vs_dense=seconds["dense"] / seconds[f"segment {index}"],
        )
        for index, segment in enumerate(plan.segments)
    )


def _mean_share(kept: tuple[tuple[int, ...], ...], units: int) -> float:
    return float(np.mean([len(block) / units for block in kept]))


def _kept_tokens(bundle: Bundle, segment: Segment) -> float:
    middle = (segment.start + segment.end) / 2
    return 1.0 if bundle.token_stats is None else float(bundle.token_stats.mean_fraction([middle]).mean())


def switch_overhead(loaded: BundleTransformer, settings: BenchSettings) -> float:
    """Measure the share of a step spent outside the engines, in a sampling loop whose engines are all resident.

    It includes everything that a single engine would not need: routing, switching and moving tensors. It is the
    median over a few loops, after one loop that activates the engines.
    """
    shares = []
    for seed in range(OVERHEAD_LOOPS + 1):
        before = loaded.residency
        _sampling_loop(loaded, settings, seed)
        after = loaded.residency
        outside = after.outside_seconds - before.outside_seconds
        shares.append(outside / (outside + after.run_seconds - before.run_seconds))
    return median(shares[1:])


def _trajectory_speedup(dense: BundleTransformer, loaded: BundleTransformer, settings: BenchSettings) -> float:
    seeds = count()  # a new seed for every loop, so that none finds its conditioning in a cache
    loops = {
        "dense": lambda: _sampling_loop(dense, settings, next(seeds)),
        "dynamic": lambda: _sampling_loop(loaded, settings, next(seeds)),
    }
    seconds = time_variants(loops, LOOP_BLOCKS)
    return seconds["dense"] / seconds["dynamic"]


def _sampling_loop(transformer: BundleTransformer, settings: BenchSettings, seed: int) -> None:
    """Call the network along one trajectory, from noise to data."""
    spec = transformer.spec
    steps = settings.steps_for(spec)
    noise, data = spec.noise_to_data
    inputs = example_inputs(spec, settings.batch, noise, seed)
    for share in ((step + 0.5) / steps for step in range(steps)):
        timestep = torch.full((settings.batch,), noise + share * (data - noise))  # (B,)
        transformer(**{**inputs, "timestep": timestep})


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the context; ONNX Runtime engines use the same number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
