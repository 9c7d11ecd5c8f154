"""Presets of models: those that dyexport knows by name, and others of the same diffusers classes. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from dyexport.backbones import BACKBONES, part
from dyexport.backbones.base import Preset
from dyexport.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from dyexport.bundle.spec import ModelSpec

CLASS_NAME = "_class_name"  # entry of every configuration that diffusers writes

PRESETS: dict[str, Preset] = {
    preset.name: preset for backbone in BACKBONES for preset in part(backbone, "preset").PRESETS
}


def get_preset(name: str) -> Preset:
    """Return the preset called ``name``. Raises ``UsageError`` that suggests the most similar name."""
    if name in PRESETS:
        return PRESETS[name]
    names = {_spelled(_repository(preset.hub_id)): preset.name for preset in PRESETS.values() if preset.hub_id}
    names |= {known: known for known in PRESETS}
    spellings = (_spelled(_repository(name)), _spelled(name))  # of a hub id, and of a name with a slash
    near = [close for spelling in spellings for close in difflib.get_close_matches(spelling, names, n=1)]
    hint = f"did you mean {names[near[0]]!r}?" if near else f"known: {', '.join(PRESETS)}"
    raise UsageError(f"unknown model {name!r}; {hint}")


def _repository(hub_id: str) -> str:
    return hub_id.rpartition("/")[2]


def _spelled(name: str) -> str:
    """Return a name in lower case, with hyphens in place of dots, slashes and underscores, as presets are spelled."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def preset_class(stock: object) -> type[Preset]:
    """Return the presets' class for a diffusers class, by its name. Raises ``CheckpointError``."""
    classes = {preset.stock: type(preset) for preset in PRESETS.values()}
    if not isinstance(stock, str) or stock not in classes:
        raise CheckpointError(f"{CLASS_NAME} is {str(stock)[:80]!r}; supported: {', '.join(classes)}")
    return classes[stock]


def preset_from_config(config: Mapping[str, Any], name: str) -> Preset:
    """Make the preset of a checkpoint from its diffusers configuration, whose class decides the backbone.

    Values that the configuration does not have are those of a known model of the same structure, if there is one.
    Raises ``CheckpointError``.
    """
    kind = preset_class(config.get(CLASS_NAME))
    made = kind.from_config(config, name)
    known = (preset for preset in PRESETS.values() if type(preset) is kind)
    like = next((preset for preset in known if preset.with_config(config) is preset), None)
    return made if like is None else replace(like, name=name)


def preset_of(spec: ModelSpec) -> Preset:
    """Return the preset of a bundle's model."""
    known = PRESETS.get(spec.name)
    if known is not None and known.backbone == spec.backbone and known.with_config(spec.config) is known:
        return known
    kind = next(type(preset) for preset in PRESETS.values() if preset.backbone == spec.backbone)
    made = kind.from_config(spec.config, spec.name).with_tokens(spec.tokens)
    return replace(
        made,
        backbone=spec.backbone,
        text_tokens=spec.text_tokens,
        pixel_space=spec.pixel_space,
        hub_id=spec.hub_id,
    )


def stored_fields(preset: Preset) -> dict[str, Any] | None:
    """Return the fields to store with a preset's name so that it can be restored; None for a known preset."""
    if PRESETS.get(preset.name) == preset:
        return None
    fields: dict[str, Any] = TypeAdapter(type(preset)).dump_python(preset, mode="json")
    return {"stock": preset.stock, **fields}


def stored_preset(name: str, fields: Mapping[str, Any] | None) -> Preset:
    """Return the preset of a name and its ``stored_fields``. Raises ``CheckpointError`` or ``UsageError``."""
    if fields is None:
        return get_preset(name)
    values = {**fields, "name": name}
    kind = preset_class(values.pop("stock", None))
    try:
        preset: Preset = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return preset


def _stored(model: str | Preset | None) -> Any:
    return (stored_fields(model) or model.name) if isinstance(model, Preset) else model


def _restored(value: Any) -> Any:
    try:
        return stored_preset(str(value.get("name")), value) if isinstance(value, Mapping) else value
    except CheckpointError as error:
        raise ValueError(str(error)) from error


Model = Annotated[str | Preset | None, PlainValidator(_restored), PlainSerializer(_stored)]
"""Model of a build, in a form that settings can store: a name, a preset, or None for that of the checkpoint."""
