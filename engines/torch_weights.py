"""Weights of a bundle's store on one device, in memory once for all engines that use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from dyexport.engines.base import WeightSpan
from dyexport.engines.onnx_file import StoredTensor
from dyexport.errors import EngineBuildError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class HeldWeights:
    """Weights by name, and the memory that they are views of. The memory is freed with the last reference to it."""

    weights: Mapping[str, torch.Tensor]
    memory: Mapping[WeightSpan, torch.Tensor]  # (bytes,) each


class StoredWeights:
    """Weights that the engines of one bundle share on one device. Thread-safe; CUDA is untested.

    On the CPU they are views of the mapped file. On CUDA, ranges of the file are copied to the device while an engine
    holds them; weights that overlap in the file are in one range. ``find_spans`` returns the weights of all engines.
    """

    def __init__(self, device: str, find_spans: Callable[[], Sequence[WeightSpan]]) -> None:
        self.device = device
        self._find_spans = find_spans
        self._memory: WeakValueDictionary[WeightSpan, torch.Tensor] = WeakValueDictionary()
        self._lock = Lock()

    def spans_of(self, tensors: Mapping[str, StoredTensor]) -> tuple[WeightSpan, ...]:
        """Return the ranges of files that are in memory while these weights are held."""
        spans = {tensor.span if self.device == "cpu" else self._ranges[tensor.span] for tensor in tensors.values()}
        return tuple(sorted(spans, key=lambda span: (span.path, span.offset, span.length)))

    def hold(self, tensors: Mapping[str, StoredTensor]) -> HeldWeights:
        """Return weights, which are loaded unless another engine holds them. Raises ``EngineBuildError``."""
        weights, memory = {}, {}
        with self._lock:
            for name, tensor in tensors.items():
                place = _whole(tensor.span.path) if self.device == "cpu" else self._ranges[tensor.span]
                if place not in memory:
                    memory[place] = self._loaded(place)
                weights[name] = _view(memory[place], tensor, tensor.span.offset - place.offset)
        return HeldWeights(weights=weights, memory=memory)

    @cached_property
    def _ranges(self) -> dict[WeightSpan, WeightSpan]:
        return merged(self._find_spans())

    def _loaded(self, place: WeightSpan) -> torch.Tensor:
        tensor = self._memory.get(place)
        if tensor is None:
            tensor = self._memory[place] = _mapped(place, self.device)
        return tensor


def merged(spans: Sequence[WeightSpan]) -> dict[WeightSpan, WeightSpan]:
    """Map every span to the union of all spans that it overlaps, directly or through others."""
    groups: list[list[WeightSpan]] = []
    path, end = None, 0
    for span in sorted(set(spans), key=lambda span: (span.path, span.offset)):
        if span.path != path or span.offset >= end:
            groups.append([])
            path, end = span.path, span.offset
        groups[-1].append(span)
        end = max(end, span.offset + span.length)
    return {span: _union(group) for group in groups for span in group}


def _union(spans: Sequence[WeightSpan]) -> WeightSpan:
    start, end = min(span.offset for span in spans), max(span.offset + span.length for span in spans)
    return WeightSpan(path=spans[0].path, offset=start, length=end - start)


def _whole(path: Path) -> WeightSpan:
    return WeightSpan(path=path, offset=0, length=path.stat().st_size)


def _mapped(place: WeightSpan, device: str) -> torch.Tensor:
    """Map a range of a file, and copy it to the device unless that is the CPU."""
    import torch

    try:
        size = place.path.stat().st_size
        file = torch.from_file(str(place.path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise EngineBuildError(f"cannot map {place.path}: {error}") from error
    return file[place.offset : place.offset + place.length].to(device)


def _view(memory: torch.Tensor, tensor: StoredTensor, offset: int) -> torch.Tensor:
    import torch

    dtype = getattr(torch, tensor.spec.dtype)
    shape = [int(size) for size in tensor.spec.shape]
    return memory[offset : offset + tensor.span.length].view(dtype).view(shape)
