"""Where a checkpoint lies, and what its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dyexport.architectures import Preset
from dyexport.errors import CheckpointError
from dyexport.models.dit import FREQ_SHIFT, STORED_POSITIONS

CONFIG = "config.json"
OWN_CONFIG = ("norm_eps", FREQ_SHIFT, STORED_POSITIONS)  # what a checkpoint may say otherwise than its preset


def find_checkpoint(source: str, preset: Preset) -> Path:
    """The file, or the directory that holds ``config.json``: a local path, or a hub id that is downloaded."""
    local = Path(source)
    if local.is_file():
        return local
    if local.exists():
        for candidate in (local, local / "transformer"):
            if (candidate / CONFIG).is_file():
                return candidate
        raise CheckpointError(f"{source} has no {CONFIG}; --checkpoint takes a diffusers directory, a file or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"{source} does not exist; pass a diffusers directory, a file, a hub id, or --random-weights"
        )
    return _download(source, preset)


def _download(hub_id: str, preset: Preset) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = snapshot_download(hub_id, allow_patterns=["transformer/*", CONFIG, "diffusion_pytorch_model*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot download {hub_id!r} for {preset.name} (no network?); "
            "pass --checkpoint with a local diffusers directory, or --random-weights"
        ) from error
    return find_checkpoint(root, preset)


def read_config(path: Path, preset: Preset) -> dict[str, Any]:
    """The preset's sizes with the checkpoint's own ``OWN_CONFIG``; a single file's config may lie beside it."""
    config = preset.transformer_config()
    file = (path if path.is_dir() else path.parent) / CONFIG
    if path.is_file() and not file.is_file():
        return config
    try:
        stored = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    for name, want in json.loads(json.dumps(config)).items():
        if name not in OWN_CONFIG and stored.get(name) not in (None, want):
            raise CheckpointError(
                f"{file}: {name} is {stored[name]}, {preset.name} has {want}; "
                "choose the --model this checkpoint was made for"
            )
    return config | {name: stored[name] for name in OWN_CONFIG if name in stored}
