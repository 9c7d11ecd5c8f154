"""Models larger than memory: a layer's weights are read for its forward pass and freed after it.

Results are equal to those of the model in memory, bit by bit. A backward pass recomputes block by block, and has one
block's weights in memory at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyexport.backbones.base import Adapter
from dyexport.models.routers import BlockRouter, Fp32Linear

M_MMAP_THRESHOLD = -3  # of malloc.h
SHARE = 0.6  # of the free memory, for weights; the rest is for activations and other processes


def must_stream(parameters: int, memory: int | None = None) -> bool:
    """Return whether a number of fp32 weights does not fit in ``memory`` bytes, by default in the memory free now."""
    import psutil

    room = SHARE * psutil.virtual_memory().available if memory is None else memory
    return parameters * torch.float32.itemsize > room


def stream_backbone(
    adapter: Adapter, config: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> nn.Module:
    """Make a stock module in fp32 that runs on ``device``. Its weights stay on disk, its buffers are on ``device``."""
    backbone: Any = empty_backbone(adapter, config, weights)
    for module in backbone.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    _stream(backbone.named_modules(), weights, device)
    # Stopping a recomputation as early as possible would leave a layer's weights behind.
    backbone.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, early_stop=False))
    return backbone


def empty_backbone(adapter: Adapter, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Make a stock module in fp32 with its buffers in memory, and its parameters on the meta device."""
    _return_freed_memory()
    with init_empty_weights(include_buffers=False):
        backbone = adapter.build(config)
    for name, buffer in backbone.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
    return backbone


def _return_freed_memory() -> None:
    """Let glibc return freed tensors to the system at once. Otherwise its heap fragments, and grows with the depth."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)


def meta_parameters(stream: bool) -> AbstractContextManager[None]:
    """Return a context in which new modules have parameters without memory, if they are to be streamed."""
    return init_empty_weights(include_buffers=False) if stream else nullcontext()


def stream_routers(
    routers: Sequence[BlockRouter], weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> None:
    """Stream the large layers of routers on the meta device, and allocate the small ones, which calibration changes.

    All run on ``device``.
    """
    for index, router in enumerate(routers):
        named = {f"{index}.{name}": module for name, module in router.named_modules()}
        large = {name: module for name, module in named.items() if isinstance(module, Fp32Linear)}
        for name in named.keys() - large.keys():
            named[name].to_empty(device=device, recurse=False)
        _stream(large.items(), weights, device)


def _stream(
    modules: Iterable[tuple[str, nn.Module]], weights: Mapping[str, Tensor], device: torch.device | str
) -> None:
    """Hook named modules so that each reads its weights onto ``device`` when it runs, and frees them after."""
    for name, module in modules:
        parameters = list(module.parameters(recurse=False))
        if not parameters:
            continue
        for parameter in parameters:
            parameter.requires_grad_(False)
        prefix = f"{name}." if name else ""
        weights_map = PrefixedDataset(weights, prefix)
        hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=weights_map)
        add_hook_to_module(module, hook)


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, with streamed tensors read from disk."""
    state = dict(module.state_dict())
    for name, child in module.named_modules():
        if (hook := getattr(child, "_hf_hook", None)) is not None:
            prefix = f"{name}." if name else ""
            state |= {f"{prefix}{leaf}": hook.weights_map[leaf] for leaf, _ in child.named_parameters(recurse=False)}
    return state
