"""Diffusion transformers that spend less compute where less is needed, deployed as slim engines.

>>> transformer = dyexport.load("out/bundle")  # stands in for ``pipe.transformer``

Names load on first use, so importing dyexport imports neither torch nor an engine's library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dyexport.errors import (
    BudgetError,
    BundleError,
    CheckpointError,
    DataError,
    DyexportError,
    EngineBuildError,
    EngineMismatch,
    ExportError,
    MissingDependency,
    SamplingError,
    StorageError,
    UsageError,
)

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "DataError",
    "DyexportError",
    "EngineBuildError",
    "EngineMismatch",
    "ExportError",
    "MissingDependency",
    "SamplingError",
    "StorageError",
    "UsageError",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from dyexport.bundle import Bundle
    from dyexport.runtime.pipeline import load
else:
    _LAZY = {
        "Bundle": "dyexport.bundle",
        "load": "dyexport.runtime.pipeline",
        # A saved pipeline names its transformer as one of these, and diffusers looks for the base class next to it.
        "DiTBundle": "dyexport.runtime.transformers",
        "FluxBundle": "dyexport.runtime.transformers",
        "LatteBundle": "dyexport.runtime.transformers",
        "ModelMixin": "diffusers",
    }

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
