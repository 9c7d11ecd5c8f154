"""Finding of a checkpoint, locally or on the hub, and reading of its configuration. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyexport.bundle.manifest_file import MANIFEST
from dyexport.errors import CheckpointError

CONFIG = "config.json"
TRANSFORMER = "transformer"  # folder of a pipeline
DYNAMIC = "dynamic"  # folder of a work directory: a checkpoint with routers
SAFETENSORS, GGUF = ".safetensors", ".gguf"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
KINDS = (SAFETENSORS, *PICKLES, GGUF)  # suffixes of files of weights
SHOWN = 200  # characters of a library's message that an error shows
CHECKPOINT_FILES = (f"{TRANSFORMER}/*", CONFIG, "diffusion_pytorch_model*")


def find_checkpoint(source: str, patterns: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """Find the file, or the directory with ``config.json``, of a local path or of a hub id, which is downloaded.

    Only files of a hub repository that match ``patterns`` are downloaded. Raises ``CheckpointError``.
    """
    if (path := find_local(source)) is not None:
        return path
    if not is_hub_id(source):
        raise CheckpointError(
            f"{source} does not exist; pass a diffusers directory, a file, a hub id, or --random-weights"
        )
    return _download(source, patterns)


def find_local(source: str) -> Path | None:
    """Find a checkpoint on this machine.

    Raises ``CheckpointError`` for a directory without ``config.json`` and a file of another kind than weights.
    """
    try:
        return _find_local(Path(source))
    except OSError as error:  # an invalid file name, or no permission to read a folder
        raise CheckpointError(
            f"cannot read {source[:SHOWN]!r}: {error.strerror}; give a directory or a file"
        ) from error


def check_kind(file: Path) -> None:
    """Raise ``CheckpointError`` unless the suffix of a file is one of weights."""
    if file.suffix not in KINDS:
        raise CheckpointError(f"{file} is of no known kind; pass a {', '.join(KINDS)} or a directory")


def is_hub_id(source: str) -> bool:
    """Return whether a source that is no path can be a repository of the hub."""
    return not source.startswith((".", "/", "~")) and not source.endswith(("/", *KINDS)) and source.count("/") == 1


def _find_local(path: Path) -> Path | None:
    if path.is_file():
        check_kind(path)
        return path
    if not path.is_dir():
        return None
    for candidate in (path, path / TRANSFORMER):
        if (candidate / CONFIG).is_file():
            return candidate
    if (path / DYNAMIC / CONFIG).is_file():
        raise CheckpointError(f"{path} is the work directory of a build; give its checkpoint, {path / DYNAMIC}")
    if (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is a bundle, which has engines and no checkpoint; give the checkpoint that it was built from, or "
            f"{DYNAMIC} in the work directory of its build"
        )
    raise CheckpointError(f"{path} has no {CONFIG}; --checkpoint takes a diffusers directory, a file or a hub id")


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = snapshot_download(hub_id, allow_patterns=list(patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot download {hub_id!r} (no network?); "
            "pass --checkpoint with a local diffusers directory, or --random-weights"
        ) from error
    return find_checkpoint(root)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ``CheckpointError`` for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {str(error)[:SHOWN]}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not the names and values of a configuration")
    return content


def check_not_quantized(config: Mapping[str, Any], file: Path) -> None:
    """Raise ``CheckpointError`` for a configuration of weights that a library has quantized."""
    if not config.get("quantization_config"):
        return
    settings = config["quantization_config"]
    method = settings.get("quant_method", "a library") if isinstance(settings, Mapping) else "a library"
    kind = config.get("_class_name", "AutoModel")
    raise CheckpointError(
        f"{file}: the weights are quantized by {str(method)[:40]}; convert them with diffusers: "
        f"{kind}.from_pretrained(DIR).dequantize().save_pretrained(NEW)"
    )
