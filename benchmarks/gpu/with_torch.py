"""Slim and dense torch modules in CUDA graphs, compiled or not, next to diffusers' own module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import Case, fill, random_inputs, weight_bytes
from benchmarks.gpu.summary import summarize
from benchmarks.gpu.timing import Run, Timing
from dyexport.backbones import get_adapter
from dyexport.errors import DyexportError, reason
from dyexport.models.inputs import NoisedInputs
from dyexport.slicing.slicer import DTYPES

ROOM = 0.8  # of free memory for weights; activations and the compiler take the rest


@torch.no_grad()
def time_case(case: Case, timing: Timing, steps: int) -> dict[str, Any]:
    """Time a case's networks. Raises ``DyexportError`` where they do not fit in memory together.

    diffusers' module is prepared last: where it cannot be captured, the record says so and the rest is timed.
    """
    stock = stock_module(case)
    sizes = {name: piece.nbytes for name, piece in case.networks.items()}
    chosen = fitting(sizes, weight_bytes(stock), free_bytes(timing.device))
    runs: dict[str, Run] = {}
    for name in chosen:
        module, given = (
            fill(case.networks[name].module, timing.device),
            network_inputs(case, name, timing.device, steps),
        )
        runs[name] = timing.ready(module, given)
    stock = fill(stock, timing.device)
    inputs = stock_inputs(case, timing.device)
    runs["eager"] = lambda: stock(**inputs, return_dict=False)[0]
    notes: dict[str, Any] = {"left_out": sorted(sizes.keys() - set(chosen))}
    try:
        runs["diffusers"] = timing.ready(lambda **given: stock(**given, return_dict=False)[0], inputs)
    except Exception as error:
        if "dense" not in runs:  # nothing else to measure against
            raise
        notes["diffusers_failure"] = f"{type(error).__name__}: {reason(error)}"
    return {**summarize(case, timing.seconds(runs), steps), **notes, "peak_bytes": peak_bytes(timing.device)}


def stock_module(case: Case) -> nn.Module:
    """Return diffusers' module on the meta device."""
    with torch.device("meta"):
        module = get_adapter(case.preset.backbone).build(case.preset.transformer_config())
    return nn.Module.to(module, DTYPES[case.spec.precision])  # diffusers' own ``to`` warns for no reason


def stock_inputs(case: Case, device: str) -> dict[str, Tensor]:
    """Return inputs at the middle of the trajectory, in the precision of the weights."""
    preset = case.preset
    sampled = NoisedInputs(preset=preset, batch_size=case.name.batch).at(sum(preset.timestep_range) / 2, device=device)
    dtype = DTYPES[case.spec.precision]
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in sampled.items()}


def network_inputs(case: Case, name: str, device: str, steps: int) -> dict[str, Tensor]:
    """Return inputs of a slim network for one step, and of the conditioning network for all steps."""
    piece = case.networks[name]
    rows = steps * (case.name.batch if len(piece.inputs) > 1 else 1)  # where t is all there is, samples share its rows
    return random_inputs(piece.inputs, {**case.sizes, "rows": rows}, device)


def fitting(sizes: Mapping[str, int], stock: int, free: int | None) -> list[str]:
    """Return the networks to load next to diffusers' module: all, or all but the dense one, which it stands for."""
    if free is None or stock + sum(sizes.values()) <= ROOM * free:
        return list(sizes)
    slim = {name: size for name, size in sizes.items() if name != "dense"}
    if (needed := stock + sum(slim.values())) > ROOM * free:
        raise DyexportError(
            f"weights take {needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free; name fewer blocks or engines"
        )
    return list(slim)


def free_bytes(device: str) -> int | None:
    return None if device == "cpu" else torch.cuda.mem_get_info()[0]


def peak_bytes(device: str) -> int | None:
    """Return the most memory that torch has had allocated since the last reset; None on a CPU."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated()
