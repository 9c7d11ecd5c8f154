"""What ``--target`` can name, and which exporter writes it. An exporter is imported when its first graph is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Target:
    """``export(slice, layout, path)`` writes one graph; ``check(path)`` raises where it is not valid."""

    suffix: str
    module: str
    export_name: str
    check_name: str | None = None

    @property
    def export(self) -> Callable[..., None]:
        return self._load(self.export_name)

    @property
    def check(self) -> Callable[..., None] | None:
        return self._load(self.check_name) if self.check_name else None

    def _load(self, name: str) -> Any:
        return getattr(import_module(self.module), name)


TARGETS = {
    "onnx": Target(
        suffix=".onnx", module="dyexport.exporters.onnx_graph", export_name="export_onnx", check_name="check_onnx"
    ),
}
