"""Layers whose activations overflow fp16, detected before a bundle is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dyexport.errors import UsageError
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.progress import Progress, no_progress

FP16_MAX = 65504.0
NAMED = 3


@torch.no_grad()
def measure_magnitudes(
    model: DynamicTransformer, inputs: NoisedInputs, points: Sequence[float], progress: Progress = no_progress
) -> dict[str, float]:
    """Measure the largest magnitude of every layer's output over calibration inputs, in the masked model in fp32.

    Blocks, whose output is the residual stream, and attention scores count as layers.
    """
    with _watching(model) as largest:
        for chunk in inputs.chunks(points, progress):
            model(inputs.over(chunk, device=model.device))
    return largest


def headroom(magnitudes: Mapping[str, float]) -> float:
    """Return the factor by which values may grow before fp16 overflows; raises ``UsageError`` if they overflow now."""
    overflowing = {name: value for name, value in magnitudes.items() if not value <= FP16_MAX}  # also NaN
    if overflowing:
        raise UsageError(
            f"fp16 holds values up to {FP16_MAX:.0f} and this model has larger ones in {_worst(overflowing)}; "
            "build with --precision bf16"
        )
    return FP16_MAX / max(magnitudes.values())


def _worst(magnitudes: Mapping[str, float]) -> str:
    names = sorted(magnitudes, key=lambda name: -magnitudes[name])
    rest = f" and {len(names) - NAMED} more layers" if len(names) > NAMED else ""
    return ", ".join(f"{name} ({magnitudes[name]:.3g})" for name in names[:NAMED]) + rest


@contextmanager
def _watching(model: DynamicTransformer) -> Iterator[dict[str, float]]:
    """Collect, inside the context, magnitudes of everything that half precision would round."""
    largest: dict[str, float] = {}
    scores = _Scores(largest)
    blocks = model.adapter.blocks(model.backbone)
    handles = []
    for name, module in model.backbone.named_modules():
        if module in blocks:
            handles.append(module.register_forward_pre_hook(partial(scores.enter, name)))
        computes = not isinstance(module, nn.Dropout) and not list(module.children())
        if module in blocks or computes:
            handles.append(module.register_forward_hook(partial(_record, largest, name)))
    try:
        with scores:
            yield largest
    finally:
        for handle in handles:
            handle.remove()


def _record(largest: dict[str, float], name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        if isinstance(output, Tensor) and output.is_floating_point():
            _note(largest, name, output)


def _note(largest: dict[str, float], name: str, values: Tensor) -> None:
    low, high = values.aminmax()
    magnitude = max(abs(float(low)), abs(float(high)))
    if not magnitude <= largest.get(name, -1.0):  # NaN replaces any number
        largest[name] = magnitude


class _Scores(TorchFunctionMode):
    """Recorder of query-key products, which no module returns."""

    def __init__(self, largest: dict[str, float]) -> None:
        super().__init__()
        self.largest = largest
        self.block = ""

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.block = name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named: dict[str, Any] = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key = named.get("query", *args[:1]), named.get("key", *args[1:2])  # (B, H, N, D)
            scale = named.get("scale") or query.shape[-1] ** -0.5
            for head in range(query.shape[1]):  # one at a time bounds memory
                _note(self.largest, f"{self.block}.scores", scale * query[:, head] @ key[:, head].transpose(1, 2))
        return func(*args, **named)
