"""Arguments of a transformer's ``forward``: checked by the name the caller knows, and brought to one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dyexport.arguments import shown
from dyexport.engines.base import Tensors
from dyexport.errors import EngineMismatchError

if TYPE_CHECKING:
    import torch

LARGEST_GUIDANCE = 1e35  # it is embedded as a thousand times itself, in fp32
PIPELINE_NULL_CLASS = 1000  # what diffusers' DiTPipeline gives as "no class", whatever the model's classes


def floating(name: str, value: Any, *shape: str) -> torch.Tensor:
    """``value``, which must be a tensor of floating-point numbers with as many dimensions as ``shape``, none empty."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim != len(shape):
        wanted = f"a floating-point tensor ({', '.join(shape)})"
        raise EngineMismatchError(f"{name} must be {wanted}, is {_described(value)}")
    if not value.numel():
        raise EngineMismatchError(f"{name} is empty: it has shape {list(value.shape)}")
    return value


def float_values(name: str, value: Any) -> list[float]:
    """A number, or a tensor of them, as the network will see them: in fp32. Reads from the device once."""
    import torch

    try:
        numbers = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise EngineMismatchError(f"{name} must be a number or a tensor of them, is {_described(value)}") from error
    if numbers.dtype == torch.bool or numbers.is_complex() or not numbers.numel():
        raise EngineMismatchError(f"{name} must be a real number or a tensor of them, is {_described(value)}")
    values: list[float] = numbers.to(torch.float32).reshape(-1).tolist()
    if wrong := [each for each in values if not math.isfinite(each)]:
        raise EngineMismatchError(f"{name} is {wrong[0]}; give a finite number")
    return values


def guidance_scale(value: Any) -> torch.Tensor:
    """A number, or a tensor of one or one for each sample: (1,) or (B,) float32 on the CPU."""
    import torch

    values = float_values("guidance", value)
    if wrong := [each for each in values if abs(each) > LARGEST_GUIDANCE]:
        raise EngineMismatchError(f"guidance is {wrong[0]:g}, which overflows when it is embedded; give such as 3.5")
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def checked_labels(value: Any, classes: int) -> torch.Tensor:
    """(1,) or (B,) int64 on the CPU, ``classes`` being no class.

    Raises ``EngineMismatchError`` for what an embedding of ``classes`` + 1 rows does not hold: torch takes a negative
    label from the end, and a fraction would lose what is behind the point.
    """
    import torch

    known = f"whole numbers from 0 to {classes - 1}, or {classes} for none, are what the conditioning was built for"
    whole = isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)
    if not whole or value.ndim > 1 or not value.numel():
        raise EngineMismatchError(f"class_labels is {_described(value)}; an int64 tensor (batch,) of {known}")
    labels = value.reshape(-1).tolist()  # (B,)
    if classes < PIPELINE_NULL_CLASS:
        labels = [classes if label == PIPELINE_NULL_CLASS else label for label in labels]
    if wrong := [label for label in labels if not 0 <= label <= classes]:
        raise EngineMismatchError(f"class_labels holds {wrong[0]}; {known}")
    return torch.tensor(labels, dtype=torch.int64, device="cpu")


def positions(txt_ids: Any, img_ids: Any) -> dict[str, torch.Tensor]:
    """Positions (T, 3) and (N, 3) in fp32, from any numbers; rounded as the stock module does, which concatenates them.

    One copy for each sample (B, N, 3) is taken too, as the published FLUX gives them.
    """
    import torch

    given = {"txt_ids": txt_ids, "img_ids": img_ids}
    for name, ids in given.items():
        if not isinstance(ids, torch.Tensor) or ids.is_complex() or ids.ndim not in (2, 3) or not ids.numel():
            raise EngineMismatchError(f"{name} must be a tensor (tokens, 3) of numbers, is {_described(ids)}")
    common = torch.promote_types(txt_ids.dtype, img_ids.dtype)
    return {name: (ids[0] if ids.ndim == 3 else ids).to(common).to(torch.float32) for name, ids in given.items()}


def check_no_gradients(tensors: Tensors) -> None:
    """Raise ``EngineMismatchError`` where a gradient should pass, which outputs of engines do not have."""
    import torch

    wanting = [name for name, tensor in tensors.items() if tensor.requires_grad] if torch.is_grad_enabled() else []
    if wanting:
        raise EngineMismatchError(
            f"{wanting[0]} requires a gradient, which cannot pass through engines; call under torch.no_grad()"
        )


def one_batch(timestep: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Expand tensors of one sample to the batch of the others, as the stock modules do by broadcasting.

    Raises ``EngineMismatchError`` for a tensor of another batch, named.
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
    """As engines take it: on their device, floating-point numbers in fp32."""
    import torch

    return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)


def check_absent(values: Mapping[str, Any], cure: str) -> None:
    """Raise ``EngineMismatchError`` for an argument that asks for something; None, False and nothing do not."""
    for name, value in values.items():
        if value is not None and value is not False and not (isinstance(value, (list, tuple)) and not value):
            raise EngineMismatchError(f"{name} cannot reach inside an engine; {cure}")


def check_attention_kwargs(name: str, values: Any) -> None:
    """Raise ``EngineMismatchError`` for what would change attention.

    None does not, nor a LoRA scale of 1, which pipelines pass.
    """
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise EngineMismatchError(f"{name} must be a dict or None, is {_described(values)}")
    asked = {key: value for key, value in values.items() if value is not None}
    if "scale" in asked and set(float_values(f"{name}['scale']", asked["scale"])) == {1.0}:
        del asked["scale"]
    if asked:
        raise EngineMismatchError(
            f"{name} {sorted(map(str, asked))} cannot reach inside an engine; "
            "leave it out (--lora FILE builds a LoRA in)"
        )


def _described(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return repr(shown(value)) if isinstance(value, str) else shown(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
