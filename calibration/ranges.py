"""Ranges of activations for quantization, segment by segment, and the error of quantization.

Activations of a diffusion transformer grow and shrink with t. The scales of a segment cover only the values in its
interval of t. One network for every t would need scales for the largest values of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dyexport.backbones.base import Inputs
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import Quantization
from dyexport.calibration.merging import SAMPLES
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.progress import Progress, no_progress
from dyexport.slicing.quantizing import LinearInput
from dyexport.slicing.recipes import quantize, scale_of

Ranges = Mapping[LinearInput, float]
"""Largest magnitude of each input."""


@torch.no_grad()
def measure_ranges(
    backbone: nn.Module,
    run: Callable[[Inputs], object],
    inputs: NoisedInputs,
    points: Sequence[float],
    linears: Iterable[LinearInput],
    progress: Progress = no_progress,
    device: torch.device | str = "cpu",
) -> dict[LinearInput, float]:
    """Measure ranges over calibration inputs at ``points``, values of t.

    ``run`` is a pass through the backbone, which is on ``device``.
    """
    ranges = dict.fromkeys(linears, 0.0)

    def watch(linear: LinearInput, module: nn.Module, read: tuple[Tensor, ...]) -> None:
        ranges[linear] = max(ranges[linear], float(_part(read[0], linear).abs().amax()))

    with _hooked(backbone, ((linear, partial(watch, linear)) for linear in ranges)):
        for chunk in inputs.chunks(points, progress):
            run(inputs.over(chunk, device=device))
    return ranges


@torch.no_grad()
def quantization_error(
    model: DynamicTransformer,
    inputs: NoisedInputs,
    segment: Segment,
    ranges: Ranges,
    quantization: Quantization,
    seed: int = 0,
) -> float:
    """Measure the squared error of a quantized segment's output, relative to its squared norm, at random t."""
    points = np.random.default_rng(seed).uniform(segment.start, segment.end, SAMPLES).astype(np.float32)
    squared_error = squared_norm = 0.0
    for chunk in inputs.chunks(points.tolist()):
        arguments = inputs.over(chunk, device=model.device)
        exact = model(arguments).sample.double()
        with fake_quantized(model.backbone, ranges, quantization):
            squared_error += float((model(arguments).sample - exact).square().sum())
        squared_norm += float(exact.square().sum())
    return squared_error / squared_norm


@contextmanager
def fake_quantized(backbone: nn.Module, ranges: Ranges, quantization: Quantization) -> Iterator[None]:
    """Quantize and dequantize inputs and weights of linear layers inside the context, as quantized engines do."""
    mode = _FakeQuantize(ranges, quantization)
    parts: dict[str, list[LinearInput]] = defaultdict(list)
    for linear in ranges:
        parts[linear.module].append(linear)
    with _hooked(backbone, ((group[0], partial(mode.enter, group)) for group in parts.values())), mode:
        yield


class _FakeQuantize(TorchFunctionMode):
    """Replacement of the operands of ``F.linear``: a streamed module has its weights only while it runs."""

    def __init__(self, ranges: Ranges, quantization: Quantization) -> None:
        super().__init__()
        self.ranges, self.quantization = ranges, quantization
        self.parts: Sequence[LinearInput] = ()  # of the Linear that runs next

    def enter(self, parts: Sequence[LinearInput], module: nn.Module, inputs: Any) -> None:
        self.parts = parts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and self.parts:
            parts, self.parts = self.parts, ()
            args = (*self._operands(parts, args[0], args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _operands(self, parts: Sequence[LinearInput], value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Round (..., in), (out, in): one scale for each part of the inputs, and one for each output of its weight."""
        value, weight = value.clone(), weight.clone()
        for part in parts:
            self._round(_part(value, part), torch.tensor(self.ranges[part]))
            rows = _part(weight, part)
            self._round(rows, rows.abs().amax(1, keepdim=True))
        return value, weight

    def _round(self, values: Tensor, largest: Tensor) -> None:
        """Round values to codes and back, in place."""
        scale = scale_of(largest.float(), self.quantization)
        values.copy_(quantize(values.float() / scale, self.quantization).float() * scale)


def _part(values: Tensor, linear: LinearInput) -> Tensor:
    """Return the channels of (..., in) that the linear layer reads."""
    start, end = linear.span or (0, values.shape[-1])
    return values[..., start:end]


@contextmanager
def _hooked(backbone: nn.Module, hooks: Iterable[tuple[LinearInput, Callable[..., None]]]) -> Iterator[None]:
    """Call each hook inside the context, before its module runs."""
    handles: list[RemovableHandle] = []
    try:
        for linear, hook in hooks:
            handles.append(backbone.get_submodule(linear.module).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
