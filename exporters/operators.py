"""Operators that torch.onnx can translate, read once per process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

_read = ONNXRegistry.from_torchlib


@contextmanager
def operators_read_once() -> Iterator[None]:
    """Let torch.onnx copy its registry of operators inside the context.

    By itself it parses the source of every operator again for each graph, a fourth of the time of an export.
    """
    try:
        ONNXRegistry.from_torchlib = staticmethod(copied_registry)  # type: ignore[assignment]
        yield
    finally:
        ONNXRegistry.from_torchlib = _read  # type: ignore[method-assign]


def copied_registry(opset_version: int) -> ONNXRegistry:
    """Return a registry to which the translations of one export can be added."""
    registry = ONNXRegistry()
    registry._opset_version = opset_version
    registry.functions = {target: list(known) for target, known in _operators(opset_version).items()}
    return registry


@cache
def _operators(opset_version: int) -> dict[Any, list[Any]]:
    return _read(opset_version).functions
