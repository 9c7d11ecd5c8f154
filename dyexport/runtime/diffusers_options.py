"""Options of diffusers' ``from_pretrained`` and ``save_pretrained``: which a bundle takes, ignores or refuses."""

from __future__ import annotations

from typing import Any

import torch

from dyexport.errors import UsageError

WEIGHT_OPTIONS = frozenset(  # of diffusers, on reading and writing weight files; a bundle ignores them
    {
        "disable_mmap",
        "low_cpu_mem_usage",
        "max_memory",
        "max_shard_size",
        "offload_folder",
        "offload_state_dict",
        "output_loading_info",
        "safe_serialization",
        "save_function",
        "use_flashpack",
        "use_safetensors",
        "variant",
    }
)


def check_options(options: dict[str, Any], known: frozenset[str]) -> None:
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"{unknown[0]} is no option of a bundle; leave it out")


def one_device(device_map: Any) -> str:
    """Return the device of a map such as ``cuda`` or ``{"": 0}``. Raises ``UsageError`` for several devices."""
    place = device_map
    if isinstance(device_map, dict):
        places = list(device_map.values())
        place = places[0] if len(places) == 1 else None
    if isinstance(place, int):
        return f"cuda:{place}"
    if not isinstance(place, (str, torch.device)):
        raise UsageError(f"device_map is {device_map!r}; a bundle runs on one device, such as 'cuda:0'")
    return str(place)
