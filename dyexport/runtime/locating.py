"""Where a bundle is: a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dyexport.errors import BundleError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_bundle(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The absolute path of a bundle's directory, downloaded where ``source`` is no directory but a hub id.

    Raises ``BundleError`` where it cannot be downloaded.
    """
    path = Path(source)
    if path.exists() or not HUB_ID.fullmatch(str(source)):
        return Path(os.path.realpath(path / (subfolder or "")))
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            str(source),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=None if subfolder is None else f"{subfolder}/*",
        )
    except (OSError, ValueError) as error:  # what the hub's client raises for networks, ids and access
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"{source} is no directory, and cannot be downloaded from the hub: {reason}; "
            "give the directory of a bundle, or the id of a repository that holds one"
        ) from error
    return (Path(root) / (subfolder or "")).resolve()
