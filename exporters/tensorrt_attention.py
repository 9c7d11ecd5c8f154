"""Attention in TensorRT networks: one layer that TensorRT fuses, from 10.14 on, or primitive layers before.

TensorRT has fused kernels for fp16 and bf16, and for some head sizes only. Without permission to decompose the layer
it refuses to build the rest, and the ONNX parser gives none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyexport.bundle.graph_forms import AttentionForm, fuse_attention
from dyexport.bundle.onnx_schema import MESSAGES


def supported_form(trt: Any) -> AttentionForm:
    """Return the form of attention that suits a version of TensorRT, given its module."""
    return "fused" if hasattr(trt, "IAttentionInputLayer") else "primitive"


def graph_in_form(graph: Path, form: AttentionForm) -> bytes:
    """Return the bytes of a graph with attention in the given form; its weights stay where they are."""
    content = graph.read_bytes()
    if form == "primitive":
        return content
    model = MESSAGES["ModelProto"].FromString(content)
    fuse_attention(model)
    return bytes(model.SerializeToString())


def allow_decomposition(trt: Any, network: Any) -> None:
    """Let TensorRT run an attention of a network in several kernels if it has no fused one for it."""
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return every layer as its base class
            layer.attention.decomposable = True
