"""Files with other names than diffusers': none is read for this backbone."""

from __future__ import annotations

from dyexport.backbones.dialect import Dialect

DIALECTS: tuple[Dialect, ...] = ()
LORA_LOADER: str | None = None
"""Class of diffusers that translates names of LoRA layers."""
