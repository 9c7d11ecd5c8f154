"""Tokens whose MLP ran at some steps of a trajectory, read from the ONNX graphs while they run.

Engines return at most how many tokens were kept. Which ones is a comparison of the router's logits with 0 inside the
graph, the only comparison in it that has one value per token. Here it is made an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyexport.bundle.onnx_schema import Message
from dyexport.bundle.plan import Segment, segment_name
from dyexport.bundle.reader import Bundle
from dyexport.engines.base import Tensors
from dyexport.engines.ort import OrtEngine
from dyexport.engines.switching import EngineChoice, SwitchingEngine
from dyexport.errors import DyexportError
from dyexport.report.pictures import Call
from dyexport.runtime.loading import load
from dyexport.runtime.transformer import BundleTransformer

COMPARISON = "Greater"


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """Tokens that ran at one step: ``kept`` is (N,) bool of the first sample, by block with a token router."""

    t: float
    kept: dict[int, np.ndarray]


class ComparingEngine(OrtEngine):
    """An engine on the CPU that also keeps the results of all comparisons in its graph, in the order of the graph."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.compared: list[np.ndarray] = []
        self._names: list[str] = []

    def _start(self, ort: Any, model: Message) -> Any:
        self._names = [node.output[0] for node in model.graph.node if node.op_type == COMPARISON]
        for name in self._names:
            model.graph.output.add(name=name)
        return super()._start(ort, model)

    def _bind(self, inputs: Tensors, outputs: Tensors) -> Any:
        binding = super()._bind(inputs, outputs)
        for name in self._names:
            binding.bind_output(name)
        return binding

    def _execute(self, binding: Any, options: Any = None) -> None:
        super()._execute(binding, options)
        self.compared = [value.numpy() for value in binding.get_outputs()[-len(self._names) :]] if self._names else []


def tokens_at(bundle: Bundle, calls: Sequence[Call]) -> list[StepTokens] | None:
    """Repeat calls of the bundle's network and return the tokens that ran.

    None for a model without token routers, for videos, whose blocks order tokens in several ways, and for graphs that
    do not run on a CPU.
    """
    if bundle.token_stats is None or bundle.manifest.model.frames is not None:
        return None
    try:
        with closing(load(bundle.root, device="cpu", check_hashes=False)) as transformer:
            engines = _replace_engines(bundle, transformer)
            steps = [_at(bundle, transformer, engines, call) for call in calls]
    except DyexportError:
        return None
    return [step for step in steps if step is not None] if all(step is not None for step in steps) else None


def _replace_engines(bundle: Bundle, transformer: BundleTransformer) -> list[ComparingEngine]:
    paths = bundle.engine_paths("onnx")
    engines = [ComparingEngine(paths[segment_name(index)]) for index in range(len(bundle.manifest.plan.segments))]
    transformer.engine = SwitchingEngine(engines, _named_by_the_transformer, max_resident=1)
    return engines


def _named_by_the_transformer(inputs: Tensors) -> EngineChoice:
    raise AssertionError("a transformer names the engine of each call")


def _at(
    bundle: Bundle, transformer: BundleTransformer, engines: Sequence[ComparingEngine], call: Call
) -> StepTokens | None:
    transformer(**call.arguments)
    index = bundle.manifest.plan.segment_for(call.t)
    batch = len(call.arguments["hidden_states"])
    kept = kept_tokens(bundle.manifest.plan.segments[index], engines[index].compared, batch)
    return None if kept is None else StepTokens(t=call.t, kept=kept)


def kept_tokens(segment: Segment, compared: Sequence[np.ndarray], batch: int) -> dict[int, np.ndarray] | None:
    """Return the kept tokens (N,) of the first sample, by block; None unless each routed block has one comparison.

    A block with a capacity also compares the tokens that it picked: as many or fewer, and after the others.
    """
    routed = [block for block, path in enumerate(segment.token_paths) if path != "all"]
    largest = max((array.size for array in compared), default=0)
    whole = [array.reshape(batch, -1) for array in compared if array.size == largest]
    if len(whole) != len(routed):
        return None
    return {block: array[0] for block, array in zip(routed, whole, strict=True)}
