"""Whole sampling loops of a bundle: their time, and the share of it that is spent outside the engines."""

from __future__ import annotations

from itertools import count
from statistics import median

import torch

from dyexport.bench.variants import Variant, on_device
from dyexport.bundle.spec import ModelSpec
from dyexport.runtime.stock import example_inputs
from dyexport.runtime.transformer import BundleTransformer

OVERHEAD_LOOPS = 3
_seeds = count()  # a new seed for every loop, so that none finds its conditioning in a cache


def sampling_loop(transformer: BundleTransformer, spec: ModelSpec, batch: int, steps: int) -> None:
    """Call the network along one trajectory, from noise to data."""
    noise, data = spec.noise_to_data
    inputs = on_device(str(transformer.device), example_inputs(spec, batch, noise, next(_seeds)))
    for share in ((step + 0.5) / steps for step in range(steps)):
        timestep = torch.full((batch,), noise + share * (data - noise), device=transformer.device)  # (B,)
        transformer(**{**inputs, "timestep": timestep})


def loop_variant(transformer: BundleTransformer, spec: ModelSpec, batch: int, steps: int) -> Variant:
    return lambda: sampling_loop(transformer, spec, batch, steps)


def switch_overhead(loaded: BundleTransformer, spec: ModelSpec, batch: int, steps: int) -> float:
    """Measure the share of a step spent outside the engines, in a sampling loop whose engines are all resident.

    It includes everything that a single engine would not need: routing, switching and moving tensors. It is the
    median over a few loops, after one loop that activates the engines.
    """
    shares = []
    for _ in range(OVERHEAD_LOOPS + 1):
        before = loaded.residency
        sampling_loop(loaded, spec, batch, steps)
        after = loaded.residency
        outside = after.outside_seconds - before.outside_seconds
        shares.append(outside / (outside + after.run_seconds - before.run_seconds))
    return median(shares[1:])
