"""Names of layers by other trainers (kohya's, XLabs', the published code's), translated by diffusers.

One module at a time: converters drop keys that they do not know, and the results of several modules cannot be
told apart. Alphas are not translated: converters round them to the factors' dtype, and forget those of the final layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

from torch import Tensor

from dyexport.errors import CheckpointError

XLABS = "processor."  # in all of XLabs' names
XLABS_PARTS = {"lora_A.weight": "down.weight", "lora_B.weight": "up.weight"}
KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def foreign_name(name: str) -> str:
    """Return the name by which diffusers' converters know a layer: dotted for XLabs, kohya's for the rest."""
    return name if XLABS in name else "lora_unet_" + name.replace(".", "_")


def translate(loader: str, file: Path, key: str, name: str, factors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the factors of a module by diffusers' keys; those of a fused layer are split.

    ``loader`` is the class of diffusers that knows the names, ``key`` is for errors. Raises ``CheckpointError``.
    """
    from diffusers.loaders import lora_pipeline

    parts = XLABS_PARTS if XLABS in name else KOHYA_PARTS
    try:
        found: dict[str, Tensor] = getattr(lora_pipeline, loader).lora_state_dict(
            {f"{name}.{parts[part]}": tensor for part, tensor in factors.items()}
        )
    except Exception as error:  # converters assert, look up and index
        why = shorten(f"{type(error).__name__} {error}", 200)
        raise CheckpointError(f"{file}: {key} is of no layer that diffusers knows ({why})") from error
    if not found:
        raise CheckpointError(f"{file}: {key} is of no layer that diffusers knows; give one by its names")
    return found
