"""What a TensorRT parser or builder would refuse, found in the graph before either is asked, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx
from onnx import NodeProto, numpy_helper

from dyexport.errors import EngineBuildError
from dyexport.plans import LARGEST_TOPK, Flavour

MODULE = "module"  # key of a node's metadata: the torch module that it came from

BOTH: frozenset[Flavour] = frozenset({"tensorrt", "tensorrt-rtx"})
RTX: frozenset[Flavour] = frozenset({"tensorrt-rtx"})


class Refusal(NamedTuple):
    """A node that a flavour does not take; ``module`` is the torch module that it came from."""

    node: str
    op_type: str
    module: str
    reason: str
    cure: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``refuses(node, constants, largest K)``; constants are the graph's small integers by name."""

    op_type: str
    flavours: frozenset[Flavour]
    refuses: Callable[[NodeProto, Mapping[str, int], int], bool]
    reason: str
    cure: str


def _always(node: NodeProto, constants: Mapping[str, int], largest: int) -> bool:
    return True


def _reduces(node: NodeProto, constants: Mapping[str, int], largest: int) -> bool:
    return any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute)


def _too_many(node: NodeProto, constants: Mapping[str, int], largest: int) -> bool:
    """A K that is computed is bounded by the largest number of rows that the network may be given."""
    return constants.get(node.input[1], largest) > LARGEST_TOPK


RULES = (
    Rule(
        op_type="NonZero",
        flavours=RTX,
        refuses=_always,
        reason="allocates by data, for which TensorRT-RTX has no layer",
        cure="build with --token-path dynamic, capacity or masked",
    ),
    *(
        Rule(
            op_type=op_type,
            flavours=BOTH,
            refuses=_reduces,
            reason="reduces as it writes, which no TensorRT takes",
            cure="write rows back with a plain ScatterND",
        )
        for op_type in ("ScatterElements", "ScatterND")
    ),
    Rule(
        op_type="TopK",
        flavours=BOTH,
        refuses=_too_many,
        reason=f"may ask for more than {LARGEST_TOPK} rows, the most that TensorRT sorts",
        cure="build with --token-path masked, or with --profile for less text",
    ),
)


def find_refusals(model: onnx.ModelProto, flavour: Flavour, *, largest_topk: int) -> tuple[Refusal, ...]:
    """Every node that ``flavour`` refuses; ``largest_topk`` bounds a K that is not a constant."""
    constants = _small_integers(model)
    return tuple(
        Refusal(node.name, node.op_type, _module_of(node), rule.reason, rule.cure)
        for node in model.graph.node
        for rule in RULES
        if node.op_type == rule.op_type and flavour in rule.flavours and rule.refuses(node, constants, largest_topk)
    )


def check_operators(model: onnx.ModelProto, flavour: Flavour, *, largest_topk: int) -> None:
    """Raises ``EngineBuildError`` naming the first refused node, its torch module and the cure."""
    refused = find_refusals(model, flavour, largest_topk=largest_topk)
    if refused:
        node, op_type, module, reason, cure = refused[0]
        more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise EngineBuildError(f"{flavour} refuses {op_type} {node!r} of module {module!r}{more}: it {reason}; {cure}")


def _module_of(node: NodeProto) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE), "unknown")


def _small_integers(model: onnx.ModelProto) -> dict[str, int]:
    """Integer constants of one element, by name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    for node in model.graph.node:
        if node.op_type == "Constant" and (value := _constant(node)) is not None:
            tensors[node.output[0]] = value
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items() if not tensor.external_data}
    return {name: int(array.item()) for name, array in arrays.items() if array.size == 1}


def _constant(node: NodeProto) -> onnx.TensorProto | None:
    return next((a.t for a in node.attribute if a.name == "value" and a.t.data_type == onnx.TensorProto.INT64), None)
