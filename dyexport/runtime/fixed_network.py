"""Methods of diffusers models that a network whose layers are inside engines refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from dyexport.errors import EngineMismatchError

MERGE = "build the bundle with --lora FILE, which merges it into the weights"
STOCK = "use the diffusers transformer for that"
TRAIN = "train the checkpoint, then build a bundle of it"
BUILT = "engines have the kernels and the precision they were built with"

REFUSED: Mapping[str, tuple[str, ...]] = {
    MERGE: (
        "add_adapter",
        "active_adapters",
        "delete_adapters",
        "disable_adapters",
        "disable_lora",
        "enable_adapters",
        "enable_lora",
        "enable_lora_hotswap",
        "fuse_lora",
        "load_lora_adapter",
        "save_lora_adapter",
        "set_adapter",
        "set_adapters",
        "unfuse_lora",
        "unload_lora",
    ),
    STOCK: (
        "_convert_ip_adapter_attn_to_diffusers",
        "_convert_ip_adapter_image_proj_to_diffusers",
        "_load_ip_adapter_weights",
        "enable_cache",
        "enable_parallelism",
        "fuse_qkv_projections",
        "set_attn_processor",
    ),
    BUILT: (
        "compile",
        "compile_repeated_blocks",
        "dequantize",
        "enable_group_offload",
        "enable_layerwise_casting",
        "set_attention_backend",
    ),
    "build a bundle of the weights, then open it with dyexport.load": ("load_state_dict",),
}
SWITCHES: Mapping[str, str] = {  # refused only when they turn something on
    "_set_gradient_checkpointing": TRAIN,
    "set_use_memory_efficient_attention_xformers": BUILT,
    "set_use_npu_flash_attention": BUILT,
    "set_use_xla_flash_attention": BUILT,
}


class FixedNetwork:
    """Mixin before a diffusers model, whose methods on layers would fail obscurely or do nothing.

    Each raises ``EngineMismatchError``. Turning off what is already off does nothing.
    """

    def train(self, mode: bool = True) -> Any:
        if mode:
            _refuse(type(self), "train", TRAIN)
        return torch.nn.Module.train(_module(self), mode)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            _refuse(type(self), "requires_grad_", TRAIN)
        return torch.nn.Module.requires_grad_(_module(self), requires_grad)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(cls, "from_config", "a bundle is opened, not initialized; use dyexport.load")

    @classmethod
    def from_single_file(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(cls, "from_single_file", "build a bundle with --checkpoint FILE, then open it with dyexport.load")


def _refuse(owner: type, name: str, cure: str) -> NoReturn:
    raise EngineMismatchError(f"{name} cannot reach the layers of {owner.__name__}, which are inside engines; {cure}")


def _refusal(name: str, cure: str) -> Callable[..., NoReturn]:
    def method(self: FixedNetwork, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(type(self), name, cure)

    return method


def _switch(name: str, cure: str) -> Callable[..., None]:
    def method(self: FixedNetwork, on: bool = True, *args: Any, enable: bool = True, **kwargs: Any) -> None:
        if on and enable:
            _refuse(type(self), name, cure)

    return method


def _module(network: FixedNetwork) -> torch.nn.Module:
    assert isinstance(network, torch.nn.Module), "the mixin is for modules"
    return network


for _cure, _names in REFUSED.items():
    for _name in _names:
        setattr(FixedNetwork, _name, _refusal(_name, _cure))
for _name, _cure in SWITCHES.items():
    setattr(FixedNetwork, _name, _switch(_name, _cure))
