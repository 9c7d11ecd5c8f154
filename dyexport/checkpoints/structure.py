"""Identification of a checkpoint's model: a preset from its files. Imports no torch for directories."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dyexport.backbones.base import Preset
from dyexport.checkpoints.locate import (
    CONFIG,
    TRANSFORMER,
    check_not_quantized,
    find_checkpoint,
    find_local,
    is_hub_id,
    read_json,
)
from dyexport.errors import CheckpointError, DyexportWarning, UsageError
from dyexport.presets import CLASS_NAME, PRESETS, get_preset, preset_class, preset_from_config, stored_preset

DYNAMIC = "dynamic.json"  # next to config.json in a dynamic checkpoint
PUBLISHED_SIZES = "a diffusers directory, whose config.json says what the model is"


def resolve_preset(model: str | Preset | None, checkpoint: str | None = None) -> Preset:
    """Return the preset of a model's name and a checkpoint, either of which may be left out.

    Where both have a structure, the checkpoint's is used, with a warning. The named model then gives only values that
    no configuration has, such as the number of text tokens, and the preset is named after the checkpoint.
    Raises ``UsageError`` and ``CheckpointError``.
    """
    named = get_preset(model) if isinstance(model, str) else model
    if checkpoint is None:
        if named is None:
            raise UsageError(f"no model is given; give --model, such as {next(iter(PRESETS))}, or a --checkpoint")
        return named
    path = _find(checkpoint, named)
    if path is None:
        assert named is not None
        return named
    if (path / DYNAMIC).is_file():
        return _dynamic(path, named)
    return _static(checkpoint, path, named)


def _find(checkpoint: str, named: Preset | None) -> Path | None:
    """Find the files with the structure; None if the named model is enough until the weights are downloaded."""
    if named is not None and checkpoint == named.hub_id:
        return None
    try:
        return find_checkpoint(checkpoint, (CONFIG, f"{TRANSFORMER}/{CONFIG}"))
    except CheckpointError:
        if named is None or not is_hub_id(checkpoint):
            raise
        return None


def _dynamic(path: Path, named: Preset | None) -> Preset:
    stored = read_dynamic_preset(path)
    if named is not None and named != stored:
        raise CheckpointError(
            f"{path} is a checkpoint of {stored.name}, not of {named.name}; leave --model out, or give {stored.name}"
        )
    return stored


def read_dynamic_preset(directory: Path) -> Preset:
    """Return the preset that a dynamic checkpoint was made of. Raises ``CheckpointError``."""
    stored = read_json(directory / DYNAMIC)
    try:
        return stored_preset(str(stored.get("preset")), stored.get("model"))
    except (CheckpointError, UsageError) as error:
        raise CheckpointError(f"{directory / DYNAMIC}: {error}") from error


def _static(checkpoint: str, path: Path, named: Preset | None) -> Preset:
    config, file = stored_config(path)
    if config is None:
        from dyexport.checkpoints.dialects import structure_of  # imports torch

        config, file = structure_of(path), path
    if config is None:
        if named is None:
            raise CheckpointError(f"{path} does not say which model it is; give --model, or {PUBLISHED_SIZES}")
        return named
    if named is None:
        known = next((preset for preset in PRESETS.values() if preset.hub_id == checkpoint), None)
        if known is None:
            made = _new_preset(config, file, _name(checkpoint, path))
            _tell_assumption(made, config, file)
            return _with_hub_id(made, checkpoint)
        named = known
    return _adapted(checkpoint, path, named, config, file)


def _new_preset(config: Mapping[str, Any], file: Path, name: str) -> Preset:
    try:
        preset = preset_from_config(config, name)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return preset if PRESETS.get(name, preset) == preset else replace(preset, name=f"{name}-custom")


def _tell_assumption(made: Preset, config: Mapping[str, Any], file: Path) -> None:
    """Warn if models of another backbone have the same diffusers class: a configuration does not tell them apart."""
    others = [preset for preset in PRESETS.values() if preset.stock == made.stock and preset.backbone != made.backbone]
    if not others:
        return
    other = next((preset for preset in others if preset.with_config(config) is preset), others[0])
    warnings.warn(
        f"{file} fits {made.backbone} and {other.backbone}; the model is built as {made.backbone}, objective "
        f"{made.objective}; for {other.backbone}, objective {other.objective}, give --model {other.name}",
        DyexportWarning,
        stacklevel=2,
    )


def _adapted(checkpoint: str, path: Path, named: Preset, config: Mapping[str, Any], file: Path) -> Preset:
    """Return a named preset with the structure of a checkpoint."""
    if CLASS_NAME in config and (kind := config[CLASS_NAME]) != named.stock:
        preset_class_of(config, file)
        raise UsageError(
            f"{checkpoint} holds a {kind}, and {named.name} is a {named.stock}; give another --model, or leave it out"
        )
    try:
        adapted = named.with_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if adapted is named:
        return named
    name = _name(checkpoint, path)
    adapted = _with_hub_id(replace(adapted, name=f"{name}-custom" if name in PRESETS else name), checkpoint)
    notice = f"{file}: {difference(config, named)}; the model is built as {adapted.name}"
    warnings.warn(notice, DyexportWarning, stacklevel=2)
    return adapted


def preset_class_of(config: Mapping[str, Any], file: Path) -> type[Preset]:
    """Return the class of presets for the configuration in ``file``. Raises ``CheckpointError`` naming the file."""
    try:
        return preset_class(config.get(CLASS_NAME))
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _with_hub_id(preset: Preset, checkpoint: str) -> Preset:
    """Return the preset with the hub repository that the checkpoint came from, if any."""
    return preset if find_local(checkpoint) is not None else replace(preset, hub_id=checkpoint)


def _name(checkpoint: str, path: Path) -> str:
    """Return a model's name: the last part of a hub id, of the directory, or of a file without its suffix."""
    if find_local(checkpoint) is None:
        name = checkpoint.rpartition("/")[2]
    else:
        resolved = path.resolve()
        resolved = resolved.parent if resolved.name == TRANSFORMER else resolved
        name = resolved.stem if path.is_file() else resolved.name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def stored_config(path: Path) -> tuple[dict[str, Any] | None, Path]:
    """Return the configuration of a checkpoint and the file it is in, which for a single file lies next to it."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    if path.is_file() and not file.is_file():
        return None, file
    config = read_json(file)
    if path.is_file() and CLASS_NAME not in config:  # a configuration of something else
        return None, file
    check_not_quantized(config, file)
    return config, file


def read_config(path: Path, preset: Preset) -> dict[str, Any]:
    """Return the arguments of the stock class: the preset's sizes, and the checkpoint's settings of numerics.

    Raises ``CheckpointError`` for a checkpoint of another structure.
    """
    sizes = preset.transformer_config()
    config, file = stored_config(path)
    if config is None:
        return sizes
    if config.get(CLASS_NAME, preset.stock) != preset.stock:
        raise CheckpointError(
            f"{file}: {CLASS_NAME} is {str(config[CLASS_NAME])[:80]!r}, {preset.name} is a {preset.stock}"
        )
    try:
        if preset.with_config(config) is not preset:
            raise CheckpointError(f"{difference(config, preset)}; choose the --model this checkpoint was made for")
        return {**sizes, **preset.numerics(config)}
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def difference(config: Mapping[str, Any], preset: Preset) -> str:
    """Describe the first size in which a configuration differs from a preset."""
    stored, expected = preset.with_config(config).transformer_config(), preset.transformer_config()
    name = next(name for name in {**expected, **stored} if stored.get(name) != expected.get(name))
    value = json.dumps(stored.get(name)) if name in config else f"{stored.get(name)} where it is not given"
    return f"{name} is {value}, {preset.name} has {expected.get(name)}"
