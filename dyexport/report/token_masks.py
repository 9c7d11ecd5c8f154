"""Tokens whose MLP ran at some steps of a trajectory, read from the ONNX graphs while they run.

Engines return at most how many tokens were kept. Which ones is decided inside the graph, where a router's logits are
compared with 0. Here these comparisons are made outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dyexport.bundle.graph_labels import MODULE
from dyexport.bundle.onnx_schema import Message
from dyexport.bundle.plan import EVERY_TOKEN, Segment, segment_name
from dyexport.bundle.plan_info import LARGEST_TOPK
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


class Compared(NamedTuple):
    """The result of one comparison, and the torch module that it came from."""

    module: str
    values: np.ndarray


class ComparingEngine(OrtEngine):
    """An engine on the CPU that also keeps the results of all comparisons in its graph, in the order of the graph."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.compared: list[Compared] = []
        self._modules: dict[str, str] = {}  # by the name of the value

    def _start(self, ort: Any, model: Message) -> Any:
        comparisons = [node for node in model.graph.node if node.op_type == COMPARISON]
        self._modules = {node.output[0]: _module_of(node) for node in comparisons}
        for name in self._modules:
            model.graph.output.add(name=name)
        return super()._start(ort, model)

    def _bind(self, inputs: Tensors, outputs: Tensors) -> Any:
        binding = super()._bind(inputs, outputs)
        for name in self._modules:
            binding.bind_output(name)
        return binding

    def _execute(self, binding: Any, options: Any = None) -> None:
        super()._execute(binding, options)
        values = binding.get_outputs()
        added = values[len(values) - len(self._modules) :]
        pairs = zip(self._modules.values(), added, strict=True)
        self.compared = [Compared(module, value.numpy()) for module, value in pairs]


def _module_of(node: Message) -> str:
    return next((str(entry.value) for entry in node.metadata_props if entry.key == MODULE), "")


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
    spec, plan = bundle.manifest.model, bundle.manifest.plan
    index = plan.segment_for(call.t)
    transformer(**call.arguments)
    segment, compared = plan.segments[index], engines[index].compared
    latents = call.arguments["hidden_states"]
    tokens = latents.shape[1] if len(spec.latent_shape) == 2 else spec.tokens  # packed latents have any number
    kept = kept_tokens(segment, compared, batch=len(latents), tokens=tokens)
    return None if kept is None else StepTokens(t=call.t, kept=kept)


def kept_tokens(
    segment: Segment, compared: Sequence[Compared], *, batch: int, tokens: int
) -> dict[int, np.ndarray] | None:
    """Return the kept tokens (N,) of the first sample, by block with a token router.

    A router's comparison is the largest of its block, and the last of that size: a block with a capacity compares the
    tokens that it picked before it counts those that the router keeps. Where text is routed too, it comes first.
    None for graphs that do not show it.
    """
    routed = [block for block, path in enumerate(segment.token_paths) if path != EVERY_TOKEN]
    by_module: dict[str, np.ndarray] = {}
    for module, values in compared:
        if module not in by_module or values.size >= by_module[module].size:
            by_module[module] = values
    whole = [values.reshape(batch, -1) for values in by_module.values() if values.size >= batch * tokens]
    if len(whole) != len(routed) or segment.largest_capacity > LARGEST_TOPK:
        return None
    return {block: values[0, -tokens:] for block, values in zip(routed, whole, strict=True)}
