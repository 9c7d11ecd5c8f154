"""Slim and dense under torch.compile and CUDA graphs, next to diffusers' own module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import Case, fill, random_inputs, weight_bytes
from benchmarks.gpu.summary import summarize
from benchmarks.gpu.timing import Run, Timing
from dyexport.backbones import get_adapter
from dyexport.errors import DyexportError
from dyexport.models.inputs import NoisedInputs
from dyexport.slicing.slicer import DTYPES

ROOM = 0.8  # of free memory for weights; activations and the compiler take the rest


@torch.no_grad()
def time_case(case: Case, timing: Timing, steps: int) -> dict[str, Any]:
    """Raises ``DyexportError`` where the networks do not fit in memory together."""
    stock = stock_module(case)
    sizes = {name: piece.nbytes for name, piece in case.networks.items()}
    chosen = fitting(sizes, weight_bytes(stock), free_bytes(timing.device))
    stock = fill(stock, timing.device)
    inputs = stock_inputs(case, timing.device)
    runs: dict[str, Run] = {"eager": lambda: stock(**inputs, return_dict=False)[0]}
    runs["diffusers"] = timing.ready(lambda **given: stock(**given, return_dict=False)[0], inputs)
    for name in chosen:
        module, given = (
            fill(case.networks[name].module, timing.device),
            network_inputs(case, name, timing.device, steps),
        )
        runs[name] = timing.ready(module, given)
    return {**summarize(case, timing.seconds(runs), steps), "left_out": sorted(sizes.keys() - set(chosen))}


def stock_module(case: Case) -> nn.Module:
    """diffusers' module, without memory for its weights."""
    with torch.device("meta"):
        module = get_adapter(case.preset.backbone).build(case.preset.transformer_config())
    return nn.Module.to(module, DTYPES[case.spec.precision])  # diffusers' own ``to`` warns, of nothing


def stock_inputs(case: Case, device: str) -> dict[str, Tensor]:
    """At the middle of the trajectory, in the precision of the weights."""
    preset = case.preset
    drawn = NoisedInputs(preset=preset, batch_size=case.name.batch).at(sum(preset.timestep_range) / 2, device=device)
    dtype = DTYPES[case.spec.precision]
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in drawn.items()}


def network_inputs(case: Case, name: str, device: str, steps: int) -> dict[str, Tensor]:
    """Of a slim network for one step; of the conditioning network for all of them."""
    piece = case.networks[name]
    rows = steps * (case.name.batch if len(piece.inputs) > 1 else 1)  # where t is all there is, samples share its rows
    return random_inputs(piece.inputs, {**case.sizes, "rows": rows}, device)


def fitting(sizes: Mapping[str, int], stock: int, free: int | None) -> list[str]:
    """The networks to load next to diffusers' module: all, or all but the dense one, which that one stands in for."""
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
