"""Locate a bundle: a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dyexport.arguments import shown
from dyexport.bundle.manifest_file import HUB_ID, check_folder
from dyexport.errors import BundleError, CheckpointError, UsageError


def find_bundle(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the absolute path of a bundle's directory; a ``source`` that is a hub id is downloaded.

    Raises ``UsageError`` for anything but a path, and ``BundleError`` for a path that is no bundle and a repository
    that cannot be downloaded.
    """
    path = _checked(source)
    if os.path.exists(path) or not HUB_ID.fullmatch(path):
        root = Path(path)
    else:
        root = _download(
            path, subfolder, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    root = Path(os.path.realpath(root / (subfolder or "")))
    check_folder(root)
    return root


def check_source(source: str, what: str) -> None:
    """Raise ``CheckpointError`` for a source that neither exists nor can be the id of a hub repository."""
    if not os.path.exists(source) and not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"cannot read {what} from {source}: it does not exist; give a directory, or the id of a repository"
        )


def _checked(source: Any) -> str:
    path = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(path, str) or not path or "\0" in path:
        raise UsageError(
            f"bundle path is {shown(repr(source))}; give the directory of a bundle, or the id of a hub repository"
        )
    return path


def _download(source: str, subfolder: str | None, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(source, allow_patterns=None if subfolder is None else f"{subfolder}/*", **options)
    except (OSError, ValueError) as error:  # what the hub's client raises for networks, ids and access
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"{source} is no directory, and cannot be downloaded from the hub: {reason}; "
            "give the directory of a bundle, or the id of a repository that holds one"
        ) from error
    return Path(root)
