"""Bundles that commands read, opened before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dyexport.bundle.reader import Bundle


def at_budget(path: Path, budget: float | None) -> Path:
    """Return the folder of one budget of a bundle of several. Raises ``BundleError`` and ``UsageError``."""
    from dyexport.arguments import check_budget
    from dyexport.bundle.reader import root_at

    return path if budget is None else root_at(path.resolve(), check_budget(budget, "--budget"))


def open_bundle(path: Path, target: str | None = None) -> Bundle:
    """Open a bundle without hashing its files. Imports no torch.

    Raises ``BundleError``, ``UsageError`` for an unknown target, and ``TargetError`` for one without engines and for
    one that cannot run the bundle's token path.
    """
    from dyexport.bundle.reader import Bundle
    from dyexport.bundle.token_paths import check_token_path
    from dyexport.engines.registry import engine_files

    files = None if target is None else engine_files(target)
    bundle = Bundle.open(path, check_hashes=False)
    if files is not None and target is not None:
        bundle.engine_paths(files)
        check_token_path(bundle, target)
    return bundle
