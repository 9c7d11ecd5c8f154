"""Bundles to compile: copies without their work directories."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dyexport.bundle.reader import Bundle
from dyexport.compilation.api import CompiledTarget, compile_bundle
from dyexport.compilation.settings import CompileSettings
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.stages.ledger import BuildListener, NullListener

RTX = "tensorrt-rtx"
ADA = TensorrtSettings(compute_capabilities=("8.9",))


def copy_of(bundle: Bundle, folder: Path) -> Path:
    """Copy a bundle to ``folder``, away from its work directory."""
    return Path(shutil.copytree(bundle.root, folder / "bundle"))


def compile_for(
    root: Path,
    *targets: str,
    tensorrt: TensorrtSettings = ADA,
    jobs: int | None = None,
    listener: BuildListener | None = None,
) -> list[CompiledTarget]:
    settings = CompileSettings(targets=targets or (RTX,), tensorrt=tensorrt, jobs=jobs)
    return compile_bundle(root, settings, listener or NullListener())


def everything_in(folder: Path) -> list[str]:
    """Names of all files, also hidden ones, below a folder."""
    return sorted(os.path.relpath(Path(place) / name, folder) for place, _, names in os.walk(folder) for name in names)
