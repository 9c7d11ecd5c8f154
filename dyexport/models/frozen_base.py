"""A frozen base in lower precision, under TD-LoRA: linear layers that store their weight in bf16, int8 or nf4.

Products are those of the dequantized weight in bf16, forward and backward, with the storage formats of bitsandbytes. So
a model whose weights are ``base_weights`` computes what training computed. The modules of bitsandbytes are not used:
their int8 product rounds activations too and keeps them for the backward pass, which defeats gradient checkpointing,
and diffusers refuses both formats without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from dyexport.backbones.recipe import BasePrecision
from dyexport.errors import missing_extras
from dyexport.models.dynamic import DynamicTransformer

BITS: Mapping[BasePrecision, float] = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4.5}  # of a weight
BLOCK = 64  # weights that share a scale in nf4
INT8_LEVELS = 127
NF4 = "nf4"


class Packed(NamedTuple):
    """A stored weight; ``scales`` is empty in bf16."""

    values: Tensor
    scales: Tensor


class Format(NamedTuple):
    """Functions that store a weight (out, in), and that restore it in bf16."""

    pack: Callable[[Tensor], Packed]
    unpack: Callable[[Packed, torch.Size], Tensor]


def _pack_bf16(weight: Tensor) -> Packed:
    return Packed(weight.to(torch.bfloat16), weight.new_empty(0))


def _pack_int8(weight: Tensor) -> Packed:
    values, scales, _ = _bitsandbytes().int8_vectorwise_quant(weight.to(torch.float16))
    return Packed(values, scales)  # (out, in), (out,)


def _unpack_int8(packed: Packed, shape: torch.Size) -> Tensor:
    return (packed.values * (packed.scales / INT8_LEVELS)[:, None]).to(torch.bfloat16)


def _pack_nf4(weight: Tensor) -> Packed:
    values, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type=NF4)
    return Packed(values, state.absmax)


def _unpack_nf4(packed: Packed, shape: torch.Size) -> Tensor:
    functional = _bitsandbytes()
    state = functional.QuantState(packed.scales, shape=shape, dtype=torch.bfloat16, blocksize=BLOCK, quant_type=NF4)
    restored: Tensor = functional.dequantize_4bit(packed.values, state)
    return restored


FORMATS: Mapping[BasePrecision, Format] = {
    "bf16": Format(_pack_bf16, lambda packed, _: packed.values),
    "int8": Format(_pack_int8, _unpack_int8),
    "nf4": Format(_pack_nf4, _unpack_nf4),
}


def _bitsandbytes() -> Any:
    """Return ``bitsandbytes.functional``. Raises ``MissingDependencyError``."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not used
    with missing_extras():
        import bitsandbytes.functional

    return bitsandbytes.functional


def check_base_precision(precision: BasePrecision) -> None:
    """Raise ``MissingDependencyError`` without the library of a precision."""
    if precision in ("int8", "nf4"):
        _bitsandbytes()


class FrozenLinear(nn.Linear):
    """A linear layer whose frozen weight is stored in another format. Its products are in bf16."""

    precision: BasePrecision
    packed: nn.Parameter  # without a gradient; a buffer would be broadcast at every step of several processes
    scales: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear, precision: BasePrecision, device: torch.device) -> None:
        """Change a linear layer in place, so that its hooks stay: its class, as ``torch.nn.utils.parametrize`` does."""
        weight = linear.weight.detach().to(device)
        del linear.weight
        linear.__class__ = cls
        frozen = cast(FrozenLinear, linear)
        frozen.precision = precision
        values, scales = FORMATS[precision].pack(weight)
        frozen.packed = nn.Parameter(values, requires_grad=False)
        frozen.scales = nn.Parameter(scales, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that products use, in bf16: (out, in)."""
        shape = torch.Size((self.out_features, self.in_features))
        return FORMATS[self.precision].unpack(Packed(self.packed, self.scales), shape)

    def forward(self, value: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        product: Tensor = _Product.apply(value.to(torch.bfloat16), bias, self)
        return product


class _Product(torch.autograd.Function):
    """Product with a weight that is dequantized again for the backward pass, and never kept."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bias: Tensor | None, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(value, linear.weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        of_value = gradient @ ctx.linear.weight if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return of_value, of_bias, None


def lower_base(model: DynamicTransformer, precision: BasePrecision, device: torch.device | str = "cpu") -> None:
    """Store the frozen weights of the blocks' linear layers in ``precision``, on ``device``; fp32 changes nothing.

    Timestep embedders stay in fp32, since routers read them, as do norms and what is outside of the blocks.
    Raises ``MissingDependencyError``.
    """
    for block in model.adapter.blocks(model.backbone):
        lower_block(block, precision, device)


def lower_block(block: nn.Module, precision: BasePrecision, device: torch.device | str) -> None:
    """Store the frozen weights of one block's linear layers as ``lower_base`` does."""
    if precision == "fp32":
        return
    for linear in list(_frozen_linears(block)):
        FrozenLinear.of(linear, precision, torch.device(device))


def frozen_linears(model: DynamicTransformer) -> Iterator[nn.Linear]:
    """Yield the linear layers of blocks whose weight is not trained."""
    for block in model.adapter.blocks(model.backbone):
        yield from _frozen_linears(block)


def _frozen_linears(module: nn.Module) -> Iterator[nn.Linear]:
    if isinstance(module, TimestepEmbedding):
        return
    if type(module) is nn.Linear and not module.weight.requires_grad:
        yield module
    for child in module.children():
        yield from _frozen_linears(child)


class BaseWeights(Mapping[str, Tensor]):
    """Weights of a stock module by diffusers' names; those that are stored in another format in bf16, one at a time."""

    def __init__(self, backbone: nn.Module) -> None:
        modules = dict(backbone.named_modules(remove_duplicate=False))
        self.frozen = {f"{name}.weight": module for name, module in modules.items() if isinstance(module, FrozenLinear)}
        hidden = {f"{name[: -len('weight')]}{part}" for name in self.frozen for part in ("packed", "scales")}
        self.plain = {name: value for name, value in backbone.state_dict().items() if name not in hidden}

    def __getitem__(self, name: str) -> Tensor:
        return self.frozen[name].weight.cpu() if name in self.frozen else self.plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.plain, *self.frozen))

    def __len__(self) -> int:
        return len(self.plain) + len(self.frozen)
