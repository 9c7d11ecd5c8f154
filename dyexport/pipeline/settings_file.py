"""Build settings as a work directory records them. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from dyexport.errors import UsageError
from dyexport.files import write_atomically

if TYPE_CHECKING:
    from dyexport.pipeline.settings import BuildSettings

SETTINGS = "settings.json"
SETTINGS_VERSION = 1


def save_settings(settings: BuildSettings) -> None:
    """Write settings to their work directory, with absolute paths."""
    values = _adapter(type(settings)).dump_python(settings, mode="json", exclude={"work"})
    values["out"] = os.path.abspath(settings.out)
    for name in ("checkpoint", "data", "vae"):
        if values[name] is not None and Path(values[name]).exists():
            values[name] = os.path.abspath(values[name])
    if settings.prompts is not None:
        values["data"] = f"{settings.data_source}:{os.path.abspath(settings.prompts)}"
    for lora, file in zip(values["loras"], settings.loras, strict=True):
        lora["file"] = os.path.abspath(file.file)
    record = {"version": SETTINGS_VERSION, "settings": values}
    write_atomically(settings.work / SETTINGS, f"{json.dumps(record, indent=1)}\n".encode())


def load_settings(kind: type[BuildSettings], work: Path) -> BuildSettings:
    """Read the settings of a work directory. Raises ``UsageError`` if it has none, or those of a newer version."""
    try:
        record = json.loads((work / SETTINGS).read_bytes())
        version, values = record["version"], record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--work {work} records no settings; give those of its build, such as --model") from error
    if version != SETTINGS_VERSION:
        raise UsageError(f"--work {work} has settings of version {version}; use a newer dyexport")
    settings = _validated(kind, work, values)
    oldest = settings.preset.token_routers[0]
    if "token_router" in values or settings.token_router_kind in (None, oldest):
        return settings
    return replace(settings, token_router=oldest)  # recorded before there was a choice


def _validated(kind: type[BuildSettings], work: Path, values: Mapping[str, Any]) -> BuildSettings:
    try:
        return _adapter(kind).validate_python({**values, "work": work})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{work / SETTINGS}: {name} is wrong ({first['msg']}); give the settings again") from error


def _adapter(kind: Any) -> TypeAdapter[BuildSettings]:
    return TypeAdapter(kind)
