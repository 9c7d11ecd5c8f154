"""Timing in alternating blocks, compiled or not: on a GPU in CUDA graphs, on a CPU without."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dyexport.errors import DyexportError

Run = Callable[[], Any]
WARM_UPS = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Method of timing: ``rounds`` times ``repeats`` runs of each variant, under torch.compile if ``compiled``."""

    device: str
    rounds: int = 10
    repeats: int = 20
    compiled: bool = False

    def ready(self, function: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Run:
        """Return the function on these inputs as it is timed: on a GPU captured into one CUDA graph."""
        require_finite(function(**inputs))
        if self.compiled:
            function = torch.compile(function, fullgraph=True, dynamic=False)
        if self.device != "cpu":
            return captured(function, inputs)
        function(**inputs)
        return lambda: function(**inputs)

    def seconds(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Return the median of one run of each. Every variant is timed in each round, so all see the same clock."""
        block = _cpu_block if self.device == "cpu" else _cuda_block
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                run()
                samples[name].append(block(run, self.repeats))
        return {name: statistics.median(values) for name, values in samples.items()}


def require_finite(output: Any) -> None:
    """Raise ``DyexportError`` for infinities, which may be faster to compute with than numbers."""
    tensors = [output] if isinstance(output, Tensor) else list(output)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise DyexportError("a network with random weights gives values that are not finite; nothing was timed")


def captured(function: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Run:
    """Return the replay of one CUDA graph that reads its inputs in place."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(**inputs)
    return graph.replay


def _cuda_block(run: Run, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _cpu_block(run: Run, repeats: int) -> float:
    begin = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - begin) / repeats
