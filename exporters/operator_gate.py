"""What a TensorRT parser or builder would refuse, found in the graph before either is asked, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx
from onnx import NodeProto, numpy_helper

from dyexport.bundle.plan_info import LARGEST_TOPK, OLDEST_FP8, Flavour
from dyexport.errors import EngineBuildError

MODULE = "module"  # key of a node's metadata: the torch module that it came from

BOTH: frozenset[Flavour] = frozenset({"tensorrt", "tensorrt-rtx"})
RTX: frozenset[Flavour] = frozenset({"tensorrt-rtx"})
FP8 = onnx.TensorProto.FLOAT8E4M3FN


class Refusal(NamedTuple):
    """A node that a flavour does not take; ``module`` is the torch module that it came from."""

    node: str
    op_type: str
    module: str
    reason: str
    cure: str


class Known(NamedTuple):
    """What a rule may look at beside a node.

    ``integers`` are the graph's small ones by name, ``fp8`` the names of its tensors in FP8, ``largest_topk`` bounds a
    K that is computed, and ``oldest`` is the lowest compute capability that is asked for. Infinite where none is: the
    builder then leaves out GPUs that cannot run the graph.
    """

    integers: Mapping[str, int]
    fp8: frozenset[str]
    largest_topk: int
    oldest: float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``refuses(node, known)``."""

    op_type: str
    flavours: frozenset[Flavour]
    refuses: Callable[[NodeProto, Known], bool]
    reason: str
    cure: str


def _always(node: NodeProto, known: Known) -> bool:
    return True


def _reduces(node: NodeProto, known: Known) -> bool:
    return any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute)


def _too_many(node: NodeProto, known: Known) -> bool:
    """A K that is computed is bounded by the largest number of rows that the network may be given."""
    return known.integers.get(node.input[1], known.largest_topk) > LARGEST_TOPK


def _too_new(node: NodeProto, known: Known) -> bool:
    """The type of a zero point is that of the codes."""
    return node.input[2] in known.fp8 and known.oldest < OLDEST_FP8


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
    Rule(
        op_type="QuantizeLinear",
        flavours=RTX,
        refuses=_too_new,
        reason=f"quantizes to FP8, in which GPUs multiply from compute capability {OLDEST_FP8} on",
        cure=f"give --compute-capability {OLDEST_FP8} or higher ones only, or build with --quantize int8",
    ),
)


def find_refusals(
    model: onnx.ModelProto, flavour: Flavour, *, largest_topk: int, compute_capabilities: Sequence[str] = ()
) -> tuple[Refusal, ...]:
    """Every node that ``flavour`` refuses; ``largest_topk`` bounds a K that is not a constant."""
    known = Known(
        integers=_small_integers(model),
        fp8=frozenset(t.name for t in model.graph.initializer if t.data_type == FP8),
        largest_topk=largest_topk,
        oldest=min((float(text) for text in compute_capabilities), default=math.inf),
    )
    return tuple(
        Refusal(node.name, node.op_type, _module_of(node), rule.reason, rule.cure)
        for node in model.graph.node
        for rule in RULES
        if node.op_type == rule.op_type and flavour in rule.flavours and rule.refuses(node, known)
    )


def check_operators(
    model: onnx.ModelProto, flavour: Flavour, *, largest_topk: int, compute_capabilities: Sequence[str] = ()
) -> None:
    """Raises ``EngineBuildError`` naming the first refused node, its torch module and the cure."""
    refused = find_refusals(model, flavour, largest_topk=largest_topk, compute_capabilities=compute_capabilities)
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
