"""Checks of a graph for operators that a TensorRT parser or builder would refuse, before either runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dyexport.bundle.graph_labels import MODULE
from dyexport.bundle.onnx_schema import FLOAT8E4M3FN, FLOAT32, INT64, Message
from dyexport.bundle.plan_info import LARGEST_TOPK, OLDEST_FP8, OLDEST_FP32, Flavour
from dyexport.errors import EngineBuildError

BOTH: frozenset[Flavour] = frozenset({"tensorrt", "tensorrt-rtx"})
RTX: frozenset[Flavour] = frozenset({"tensorrt-rtx"})


class UnsupportedOp(NamedTuple):
    """A node that a flavour does not support; ``module`` is the torch module that it was exported from."""

    node: str
    op_type: str
    module: str
    reason: str
    cure: str


class RuleContext(NamedTuple):
    """Facts about a graph and a request that rules need, apart from the node.

    ``integers`` holds the graph's scalar integer constants by name, ``fp8`` and ``fp32`` the names of tensors in it.
    ``largest_topk`` bounds a computed K. ``oldest`` is the lowest compute capability requested; it is infinite if
    none is requested, because the builder then skips GPUs that cannot run the graph.
    """

    integers: Mapping[str, int]
    fp8: frozenset[str]
    fp32: frozenset[str]
    largest_topk: int
    oldest: float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An operator that ``flavours`` do not support where ``matches(node, context)``."""

    op_type: str
    flavours: frozenset[Flavour]
    matches: Callable[[Message, RuleContext], bool]
    reason: str
    cure: str


def _always(node: Message, context: RuleContext) -> bool:
    return True


def _reduces(node: Message, context: RuleContext) -> bool:
    return any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute)


def _too_many(node: Message, context: RuleContext) -> bool:
    """Compare K, or the bound of a computed K, with what TensorRT sorts."""
    return context.integers.get(node.input[1], context.largest_topk) > LARGEST_TOPK


def _too_new(node: Message, context: RuleContext) -> bool:
    """Compare the type of the zero point, which is that of the quantized values."""
    return node.input[2] in context.fp8 and context.oldest < OLDEST_FP8


def _too_old(node: Message, context: RuleContext) -> bool:
    """Look at the weight of a product: routers and modulation are in fp32 whatever the precision."""
    return node.input[1] in context.fp32 and context.oldest < OLDEST_FP32


RULES = (
    Rule(
        op_type="NonZero",
        flavours=RTX,
        matches=_always,
        reason="has a data-dependent output shape, for which TensorRT-RTX has no layer",
        cure="build with --token-path dynamic, capacity or masked",
    ),
    *(
        Rule(
            op_type=op_type,
            flavours=BOTH,
            matches=_reduces,
            reason="reduces as it writes, which TensorRT does not support",
            cure="write rows back with a plain ScatterND",
        )
        for op_type in ("ScatterElements", "ScatterND")
    ),
    Rule(
        op_type="TopK",
        flavours=BOTH,
        matches=_too_many,
        reason=f"may ask for more than {LARGEST_TOPK} rows, the most that TensorRT sorts",
        cure="build with --token-path masked, or with --profile for less text",
    ),
    Rule(
        op_type="QuantizeLinear",
        flavours=RTX,
        matches=_too_new,
        reason=f"quantizes to FP8, in which GPUs multiply from compute capability {OLDEST_FP8} on",
        cure=f"give --compute-capability {OLDEST_FP8} or higher ones only, or build with --quantize int8",
    ),
    Rule(
        op_type="Gemm",
        flavours=RTX,
        matches=_too_old,
        reason=f"multiplies in fp32, which TensorRT-RTX does from compute capability {OLDEST_FP32} on",
        cure=f"give --compute-capability {OLDEST_FP32} or higher ones only",
    ),
)


def find_unsupported(
    model: Message, flavour: Flavour, *, largest_topk: int, compute_capabilities: Sequence[str] = ()
) -> tuple[UnsupportedOp, ...]:
    """Return every node that ``flavour`` refuses; ``largest_topk`` bounds a K that is not a constant."""
    context = RuleContext(
        integers=_small_integers(model),
        fp8=_tensors_of(model, FLOAT8E4M3FN),
        fp32=_tensors_of(model, FLOAT32),
        largest_topk=largest_topk,
        oldest=min((float(text) for text in compute_capabilities), default=math.inf),
    )
    return tuple(
        UnsupportedOp(node.name, node.op_type, _module_of(node), rule.reason, rule.cure)
        for node in model.graph.node
        for rule in RULES
        if node.op_type == rule.op_type and flavour in rule.flavours and rule.matches(node, context)
    )


def check_operators(
    model: Message, flavour: Flavour, *, largest_topk: int, compute_capabilities: Sequence[str] = ()
) -> None:
    """Raise ``EngineBuildError`` naming the first unsupported node, its torch module and the cure."""
    unsupported = find_unsupported(model, flavour, largest_topk=largest_topk, compute_capabilities=compute_capabilities)
    if unsupported:
        node, op_type, module, reason, cure = unsupported[0]
        more = f" ({len(unsupported) - 1} more like it)" if len(unsupported) > 1 else ""
        raise EngineBuildError(f"{flavour} refuses {op_type} {node!r} of module {module!r}{more}: it {reason}; {cure}")


def _tensors_of(model: Message, data_type: int) -> frozenset[str]:
    return frozenset(tensor.name for tensor in model.graph.initializer if tensor.data_type == data_type)


def _module_of(node: Message) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE), "unknown")


def _small_integers(model: Message) -> dict[str, int]:
    """Return integer constants of one element by name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == INT64}
    for node in model.graph.node:
        if node.op_type == "Constant" and (value := _constant(node)) is not None:
            tensors[node.output[0]] = value
    values = {name: _integers(tensor) for name, tensor in tensors.items() if not tensor.external_data}
    return {name: integers[0] for name, integers in values.items() if len(integers) == 1}


def _integers(tensor: Message) -> list[int]:
    """Return the elements of an INT64 tensor, which are in one of two fields."""
    return [int(value) for value in tensor.int64_data or np.frombuffer(tensor.raw_data, np.dtype("<i8"))]


def _constant(node: Message) -> Message | None:
    return next((a.t for a in node.attribute if a.name == "value" and a.t.data_type == INT64), None)
