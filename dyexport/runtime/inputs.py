"""Checks of the arguments of a stand-in's ``forward``, which name the argument and the cure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dyexport.arguments import shown
from dyexport.engines.base import Tensors
from dyexport.errors import EngineMismatchError

if TYPE_CHECKING:
    import torch


def floating(name: str, value: Any, *shape: str) -> torch.Tensor:
    """Return ``value`` if it is a floating-point tensor with the dimensions ``shape``, none of them empty.

    Raises ``EngineMismatchError``.
    """
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim != len(shape):
        raise EngineMismatchError(f"{name} must be a floating-point tensor ({', '.join(shape)}), is {described(value)}")
    if not value.numel():
        raise EngineMismatchError(f"{name} is empty: it has shape {list(value.shape)}")
    return value


def float_values(name: str, value: Any) -> list[float]:
    """Return a number, or the numbers of a tensor, rounded to fp32 as the network will see them.

    Reads from the device once. Raises ``EngineMismatchError`` for anything but finite real numbers.
    """
    import torch

    try:
        numbers = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise EngineMismatchError(f"{name} must be a number or a tensor of them, is {described(value)}") from error
    if numbers.dtype == torch.bool or numbers.is_complex() or not numbers.numel():
        raise EngineMismatchError(f"{name} must be a real number or a tensor of them, is {described(value)}")
    values: list[float] = numbers.to(torch.float32).reshape(-1).tolist()
    if wrong := [number for number in values if not math.isfinite(number)]:
        raise EngineMismatchError(f"{name} is {wrong[0]}; give a finite number")
    return values


def check_no_gradients(tensors: Tensors) -> None:
    """Raise ``EngineMismatchError`` for a tensor that requires a gradient, which engines do not compute."""
    import torch

    tracked = [name for name, tensor in tensors.items() if tensor.requires_grad] if torch.is_grad_enabled() else []
    if tracked:
        raise EngineMismatchError(
            f"{tracked[0]} requires a gradient, which cannot pass through engines; call under torch.no_grad()"
        )


def one_batch(timestep: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Expand tensors of one sample to the batch of the others, as the stock modules do by broadcasting.

    Raises ``EngineMismatchError`` naming a tensor of another batch size.
    """
    import torch

    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    sizes["timestep"] = timestep.numel() if isinstance(timestep, torch.Tensor) else 1
    first, batch = next(((name, size) for name, size in sizes.items() if size != 1), ("", 1))
    for name, size in sizes.items():
        if size not in (1, batch):
            raise EngineMismatchError(f"{name} is for {size} samples, {first} for {batch}; give {batch}, or 1 for all")
    return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in tensors.items()}


def for_engine(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a tensor to the engines' device, floating-point numbers in fp32."""
    import torch

    return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)


def check_absent(values: Mapping[str, Any], cure: str) -> None:
    """Raise ``EngineMismatchError`` for an argument that is not None, False or empty."""
    for name, value in values.items():
        if value is not None and value is not False and not (isinstance(value, (list, tuple)) and not value):
            raise EngineMismatchError(f"{name} cannot reach inside an engine; {cure}")


def check_attention_kwargs(name: str, values: Any) -> None:
    """Raise ``EngineMismatchError`` for arguments that would change attention; a LoRA scale of 1 does not."""
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise EngineMismatchError(f"{name} must be a dict or None, is {described(values)}")
    set_values = {key: value for key, value in values.items() if value is not None}
    if "scale" in set_values and set(float_values(f"{name}['scale']", set_values["scale"])) == {1.0}:
        del set_values["scale"]
    if set_values:
        raise EngineMismatchError(
            f"{name} {sorted(map(str, set_values))} cannot reach inside an engine; "
            "leave it out (--lora FILE builds a LoRA in)"
        )


def described(value: Any) -> str:
    """Describe a value in a message; a tensor by its dtype and shape."""
    import torch

    if not isinstance(value, torch.Tensor):
        return repr(shown(value)) if isinstance(value, str) else shown(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
