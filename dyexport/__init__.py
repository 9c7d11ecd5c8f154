"""Diffusion transformers that spend less compute where less is needed, deployed as slim engines.

>>> import dyexport
>>> bundle = dyexport.build("sit-digits", budget=0.5, random_weights=True, engines=2)  # writes ./sit-digits-0.5
>>> dyexport.verify(bundle, timesteps=4).passed
True
>>> transformer = dyexport.load("sit-digits-0.5")  # a drop-in replacement for ``pipe.transformer``
>>> samples = dyexport.sample(transformer, labels=[3, 7], steps=4)

The names in ``__all__`` are the public interface; everything else is private and may change without notice. They load
on first use, so importing dyexport imports neither torch nor an engine's library.
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
    DyexportWarning,
    EngineBuildError,
    EngineMismatchError,
    ExportError,
    MissingDependencyError,
    SamplingError,
    StorageError,
    TargetError,
    UsageError,
    missing_extras,
)

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "BuildSettings",
    "Bundle",
    "BundleError",
    "BundleTransformer",
    "CheckpointError",
    "DataError",
    "Drift",
    "DyexportError",
    "DyexportWarning",
    "EngineBuildError",
    "EngineMismatchError",
    "EvalReport",
    "ExportError",
    "GoldenCheck",
    "GoldenReport",
    "LayerReport",
    "LoraFile",
    "LoraSpec",
    "Manifest",
    "MissingDependencyError",
    "ModelScores",
    "Overflow",
    "PairedScores",
    "Residency",
    "Samples",
    "SamplingError",
    "SeedScores",
    "SegmentErrors",
    "StorageError",
    "SwitchCost",
    "SyntheticConfig",
    "TargetError",
    "TensorrtSettings",
    "UsageError",
    "VerifyReport",
    "__version__",
    "build",
    "compile_engines",
    "evaluate",
    "load",
    "sample",
    "verify",
]

if TYPE_CHECKING:
    from dyexport.bundle.manifest import Manifest
    from dyexport.bundle.reader import Bundle
    from dyexport.compilation.api import compile_engines
    from dyexport.engines.switching import SwitchCost
    from dyexport.evaluating import evaluate
    from dyexport.evaluation.report import Drift, EvalReport, GoldenCheck, ModelScores, PairedScores, SeedScores
    from dyexport.exporters.tensorrt_profiles import TensorrtSettings
    from dyexport.lora import LoraFile, LoraSpec
    from dyexport.pipeline.api import build
    from dyexport.pipeline.settings import BuildSettings
    from dyexport.runtime.loading import load
    from dyexport.runtime.overflow import Overflow
    from dyexport.runtime.residency import Residency
    from dyexport.runtime.transformer import BundleTransformer
    from dyexport.samples import Samples, sample
    from dyexport.training.synthetic_config import SyntheticConfig
    from dyexport.verification.report import GoldenReport, LayerReport, SegmentErrors, VerifyReport
    from dyexport.verification.verify import verify
else:
    _LAZY = {
        "BuildSettings": "dyexport.pipeline.settings",
        "Bundle": "dyexport.bundle.reader",
        "BundleTransformer": "dyexport.runtime.transformer",
        "Drift": "dyexport.evaluation.report",
        "EvalReport": "dyexport.evaluation.report",
        "GoldenCheck": "dyexport.evaluation.report",
        "GoldenReport": "dyexport.verification.report",
        "LayerReport": "dyexport.verification.report",
        "LoraFile": "dyexport.lora",
        "LoraSpec": "dyexport.lora",
        "Manifest": "dyexport.bundle.manifest",
        "ModelScores": "dyexport.evaluation.report",
        "Overflow": "dyexport.runtime.overflow",
        "PairedScores": "dyexport.evaluation.report",
        "Residency": "dyexport.runtime.residency",
        "Samples": "dyexport.samples",
        "SeedScores": "dyexport.evaluation.report",
        "SegmentErrors": "dyexport.verification.report",
        "SwitchCost": "dyexport.engines.switching",
        "SyntheticConfig": "dyexport.training.synthetic_config",
        "TensorrtSettings": "dyexport.exporters.tensorrt_profiles",
        "VerifyReport": "dyexport.verification.report",
        "build": "dyexport.pipeline.api",
        "compile_engines": "dyexport.compilation.api",
        "evaluate": "dyexport.evaluating",
        "load": "dyexport.runtime.loading",
        "sample": "dyexport.samples",
        "verify": "dyexport.verification.verify",
        # A saved pipeline names its transformer by its class here, and diffusers looks for the base class next to it.
        "ModelMixin": "diffusers",
    }

    def __getattr__(name: str) -> object:
        with missing_extras():
            value = getattr(import_module(_LAZY[name]), name) if name in _LAZY else _stand_in(name)
        if value is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def _stand_in(name: str) -> object:
        """Return the stand-in of that name for a diffusers transformer, or None."""
        from dyexport.backbones import BACKBONES, get_stand_in

        if not name.endswith("Bundle"):
            return None
        return {cls.__name__: cls for cls in map(get_stand_in, BACKBONES)}.get(name)

    def __dir__() -> list[str]:
        return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
