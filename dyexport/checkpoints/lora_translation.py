"""Translation of layer names by other trainers (kohya, XLabs, the published code), done by diffusers.

One module is translated at a time: converters drop unknown keys, and do not say which result belongs to which module.
Alphas are not translated: converters round them to the factors' dtype, and drop those of the final layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

from torch import Tensor

from dyexport.errors import CheckpointError

XLABS = "processor."  # part of all names by XLabs
XLABS_PARTS = {"lora_A.weight": "down.weight", "lora_B.weight": "up.weight"}
KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def converter_name(name: str) -> str:
    """Return the layer name that diffusers' converters expect: XLabs names stay, others get kohya's form."""
    return name if XLABS in name else "lora_unet_" + name.replace(".", "_")


def translate(loader: str, file: Path, key: str, name: str, factors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the factors of a module by diffusers' keys; those of a fused layer are split.

    ``loader`` is the diffusers class that converts the names. ``key`` is the file's key that errors name.
    Raises ``CheckpointError``.
    """
    from diffusers.loaders import lora_pipeline

    parts = XLABS_PARTS if XLABS in name else KOHYA_PARTS
    try:
        translated: dict[str, Tensor] = getattr(lora_pipeline, loader).lora_state_dict(
            {f"{name}.{parts[part]}": tensor for part, tensor in factors.items()}
        )
    except Exception as error:  # converters assert, look up and index
        reason = shorten(f"{type(error).__name__} {error}", 200)
        raise CheckpointError(f"{file}: {key} is of no layer that diffusers knows ({reason})") from error
    if not translated:
        raise CheckpointError(f"{file}: {key} is of no layer that diffusers knows; give one by its names")
    return translated
