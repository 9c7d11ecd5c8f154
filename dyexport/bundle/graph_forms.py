"""Two forms of attention in a graph: primitive operators, as stored, or one fused operator.

Graphs are stored in opset 20, which has no attention operator. On a GPU, that form may write the scores of all pairs of
tokens to memory. Opset 23 has ``Attention``, for which TensorRT and ONNX Runtime's CUDA provider have fused kernels. On
a CPU, ONNX Runtime takes the same time for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dyexport.bundle.onnx_schema import MESSAGES, Message

AttentionForm = Literal["primitive", "fused"]

OPSET = 23  # the first with ``Attention``
SWAPPED = [0, 1, 3, 2]  # axes of a transposed key
FLOAT, INT, INTS = 1, 2, 7  # types of attributes, as in ``AttributeProto``


@dataclass(frozen=True, kw_only=True)
class _Pattern:
    """Inputs of one attention, and outputs of the nodes that it makes superfluous; ``mask`` is empty without one."""

    query: str
    key: str
    value: str
    mask: str
    replaced: frozenset[str]


def fuse_attention(model: Message) -> int:
    """Replace every MatMul-Softmax-MatMul of a ``ModelProto`` by an ``Attention`` node; return their number.

    A graph with any of them is raised to opset 23, in which its other operators compute what they do in opset 20.
    Nodes keep the name and the metadata of the last node that they replace.
    """
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    found = {node.output[0]: match for node in graph.node if (match := _match(node, makers, readers)) is not None}
    gone = frozenset[str]().union(*(match.replaced for match in found.values()))
    expanded: set[str] = set()
    nodes = []
    for node in graph.node:
        if (match := found.get(node.output[0])) is not None:
            if match.mask and match.mask not in expanded:
                nodes.extend(_expand(match.mask, match.query))
                expanded.add(match.mask)
            _replace(node, match)
        if node.output[0] not in gone:
            nodes.append(node)
    if found:
        _rewrite(model, nodes)
    return len(found)


def _rewrite(model: Message, nodes: Sequence[Message]) -> None:
    kept = [MESSAGES["NodeProto"].FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = max(entry.version, OPSET)


def _match(node: Message, makers: Mapping[str, Message], readers: Mapping[str, int]) -> _Pattern | None:
    """Match the nodes of one attention, from its last product back to its transposed key."""
    softmax = _made_by("Softmax", node, 0, makers)
    if node.op_type != "MatMul" or softmax is None or _axis(softmax) not in (-1, 3):
        return None
    added = _made_by("Add", softmax, 0, makers)
    product = _made_by("MatMul", softmax if added is None else added, 0, makers)
    key = None if product is None else _made_by("Transpose", product, 1, makers)
    if product is None or key is None or _permutation(key) != SWAPPED:
        return None
    between = [each.output[0] for each in (softmax, added, product) if each is not None]
    if any(readers[name] != 1 for name in between):
        return None
    transposed = [key.output[0]] if readers[key.output[0]] == 1 else []
    return _Pattern(
        query=product.input[0],
        key=key.input[0],
        value=node.input[1],
        mask="" if added is None else added.input[1],
        replaced=frozenset([*between, *transposed]),
    )


def _made_by(op_type: str, node: Message, index: int, makers: Mapping[str, Message]) -> Message | None:
    """Return the node of a type that makes an input; None if another node or none does."""
    maker = makers.get(node.input[index]) if index < len(node.input) else None
    return maker if maker is not None and maker.op_type == op_type and maker.domain == "" else None


def _axis(softmax: Message) -> int:
    return next((int(attribute.i) for attribute in softmax.attribute if attribute.name == "axis"), -1)


def _permutation(transpose: Message) -> list[int]:
    return next((list(attribute.ints) for attribute in transpose.attribute if attribute.name == "perm"), [])


def _replace(node: Message, pattern: _Pattern) -> None:
    """Turn the last product of a pattern into ``Attention``."""
    mask = [_expanded(pattern.mask)] if pattern.mask else []
    node.op_type = "Attention"
    del node.input[:]
    node.input.extend([pattern.query, pattern.key, pattern.value, *mask])
    node.attribute.append(_attribute("scale", f=1.0, type=FLOAT))  # the weights of queries include it


def _expand(mask: str, query: str) -> list[Message]:
    """Return nodes that repeat a mask (B, 1, 1, N) for every row of scores: ONNX Runtime does not broadcast it."""
    rows, one, shape, out = (f"{_expanded(mask)}{end}" for end in ("_rows", "_one", "_shape", ""))
    last_axes = [_attribute("start", i=2, type=INT), _attribute("end", i=3, type=INT)]
    return [
        _node("Shape", [query], rows, *last_axes),
        _node("Constant", [], one, _attribute("value_ints", ints=[1], type=INTS)),
        _node("Concat", [rows, one], shape, _attribute("axis", i=0, type=INT)),
        _node("Expand", [mask, shape], out),
    ]


def _expanded(mask: str) -> str:
    return f"{mask}_rows_expanded"


def _node(op_type: str, inputs: list[str], output: str, *attributes: Message) -> Message:
    return MESSAGES["NodeProto"](name=output, op_type=op_type, input=inputs, output=[output], attribute=attributes)


def _attribute(name: str, **fields: Any) -> Message:
    return MESSAGES["AttributeProto"](name=name, **fields)
