"""Foreign names of FLUX's layers (Black Forest Labs', kohya's, XLabs'), translated by diffusers.

Alphas stay out of it: the converters round them to the factors' dtype, and forget those of the final layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from dyexport.errors import CheckpointError

KOHYA, XLABS = "lora_unet_", "processor."
SUFFIXES = {
    KOHYA: {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"},
    XLABS: {"lora_A.weight": "down.weight", "lora_B.weight": "up.weight"},
}


def foreign_name(name: str) -> str:
    """The name by which diffusers' converters know a layer: dotted for XLabs, kohya's for the rest."""
    return name if XLABS in name else KOHYA + name.replace(".", "_")


def translate(file: Path, factors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, str]]:
    """Factors by diffusers' keys, each with the foreign module that it is of; refuses what diffusers would drop."""
    xlabs = {name: parts for name, parts in factors.items() if XLABS in name}
    kohya = {name: parts for name, parts in factors.items() if name not in xlabs}
    return _translate(file, xlabs, SUFFIXES[XLABS]) | _translate(file, kohya, SUFFIXES[KOHYA])


def _translate(
    file: Path, factors: Mapping[str, Mapping[str, Tensor]], suffixes: Mapping[str, str]
) -> dict[str, tuple[Tensor, str]]:
    """Run the converter twice: on the tensors, and on as many that are filled with their places in the file."""
    given = {f"{name}.{suffixes[part]}": tensor for name, parts in factors.items() for part, tensor in parts.items()}
    modules = [name for name, parts in factors.items() for _ in parts]
    places = {key: torch.full(given[key].shape, place) for place, key in enumerate(given, start=1)}
    try:
        found, origins = _convert(given), _convert(places)
    except Exception as error:  # converters assert, look up and index
        why = shorten(f"{type(error).__name__} {error}", 300)
        raise CheckpointError(f"{file}: diffusers cannot translate its names for FLUX: {why}") from error
    used = {int(place) for tensor in origins.values() for place in tensor.unique()}
    if dropped := [key for place, key in enumerate(given, start=1) if place not in used]:
        raise CheckpointError(f"{file}: diffusers has no translation of {dropped[0]}; save it by diffusers' own names")
    return {key: (tensor, modules[int(origins[key].flatten()[0]) - 1]) for key, tensor in found.items()}


def _convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    translated: dict[str, Tensor] = FluxLoraLoaderMixin.lora_state_dict(dict(tensors)) if tensors else {}
    return translated
