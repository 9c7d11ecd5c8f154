"""The models dyexport knows by name, at their published sizes. Imports no torch."""

from __future__ import annotations

import difflib

from dyexport.backbones import BACKBONES, part
from dyexport.backbones.base import Preset
from dyexport.errors import UsageError

PRESETS: dict[str, Preset] = {
    preset.name: preset for backbone in BACKBONES for preset in part(backbone, "preset").PRESETS
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``; raises ``UsageError`` naming the nearest known one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"
    raise UsageError(f"unknown model {name!r}; {hint}")
