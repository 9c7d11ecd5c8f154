"""Where a checkpoint lies, and what its configuration says."""

from __future__ import annotations

import inspect
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset
from dyexport.errors import CheckpointError

CONFIG = "config.json"
CLASS_NAME = "_class_name"  # entry of every config that diffusers writes
IMMATERIAL = ("dropout", "upcast_attention", "norm_num_groups")  # do not change what these models compute in fp32
SHOWN = 200  # characters of what a library says


class _Own(BaseModel):
    """Values in which a checkpoint may differ from its preset."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    norm_eps: float = Field(default=1e-5, ge=1e-12, le=1)
    freq_shift: int | float = Field(default=1, ge=0, lt=128)
    stored_positions: bool = False


OWN_CONFIG = tuple(_Own.model_fields)


def find_checkpoint(source: str, preset: Preset) -> Path:
    """The file, or the directory that holds ``config.json``: a local path, or a hub id that is downloaded."""
    try:
        found = _find_local(Path(source))
    except OSError as error:  # a name that no file can have, or a folder that may not be read
        raise CheckpointError(
            f"cannot read {source[:SHOWN]!r}: {error.strerror}; give a directory or a file"
        ) from error
    if found is not None:
        return found
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"{source} does not exist; pass a diffusers directory, a file, a hub id, or --random-weights"
        )
    return _download(source, preset)


def _find_local(path: Path) -> Path | None:
    if not path.is_dir():
        return path if path.is_file() else None
    for candidate in (path, path / "transformer"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise CheckpointError(f"{path} has no {CONFIG}; --checkpoint takes a diffusers directory, a file or a hub id")


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
    """The preset's sizes with the checkpoint's own ``OWN_CONFIG``; a single file's config may lie beside it.

    What a config does not tell is what diffusers takes by default, preset or not. Raises ``CheckpointError``.
    """
    config, defaults = preset.transformer_config(), _defaults(preset)
    file = (path if path.is_dir() else path.parent) / CONFIG
    if path.is_file() and not file.is_file():
        return config
    stored = read_json(file)
    if path.is_file() and CLASS_NAME not in stored:  # of something else that lies there
        return config
    told = {**defaults, **stored}
    for name, want in {**defaults, **config}.items():
        if name not in (*OWN_CONFIG, *IMMATERIAL) and _plain(name, told) != _plain(name, {name: want, **config}):
            found = reprlib.repr(told[name]) + ("" if name in stored else " where it is not given")
            raise CheckpointError(
                f"{file}: {name} is {found}, {preset.name} has {want}; choose the --model this checkpoint was made for"
            )
    return config | _own_config(
        file, {name: told[name] for name in OWN_CONFIG if name in told and name in stored | config}
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises ``CheckpointError`` for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {str(error)[:SHOWN]}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not the names and values of a configuration")
    return content


def _defaults(preset: Preset) -> dict[str, Any]:
    """Defaults of the stock class."""
    parameters = inspect.signature(get_adapter(preset.backbone).stock).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _plain(name: str, config: Mapping[str, Any]) -> Any:
    """A value as JSON has it; the stock classes put out as many channels as they take in where nothing else is said."""
    value = config[name]
    if name == "out_channels" and value is None:
        value = config["in_channels"]
    return list(value) if isinstance(value, tuple) else value


def _own_config(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _Own.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise CheckpointError(
            f"{file}: {name} is {reprlib.repr(values[str(name)])} ({error.errors()[0]['msg']}); correct it"
        ) from error
