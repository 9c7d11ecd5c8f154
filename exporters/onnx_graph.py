"""Slim modules to ONNX graphs whose weights are references into the store.

Modules are exported from the meta device: no weight is ever in memory here, whatever the model's size.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

from dyexport.bundle import ModelSpec, Segment
from dyexport.errors import ExportError
from dyexport.slicing.recipes import StoreLayout
from dyexport.slicing.slicer import Slice

OPSET = 20
STORE = "weights.bin"


def export_onnx(spec: ModelSpec, segment: Segment, slice_: Slice, layout: StoreLayout, path: Path) -> None:
    """Write the graph of one segment to ``path``; its weights are those of ``layout``, in ``weights.bin`` beside it.

    Inputs: ``hidden_states`` (batch, C, H, W), ``timestep`` (batch,), ``class_labels`` (batch,), and where
    the segment needs them ``width_gate`` (W,) and ``slots`` (slots,). Outputs: ``sample`` and, with token
    routers, ``kept_tokens`` (batch, L). Raises ``ExportError``.
    """
    inputs = _example_inputs(spec, segment)
    model = _export(slice_.module, inputs, segment)
    _optimize(model, slice_)
    refer_to_store(model, slice_, layout)
    strip_metadata(model)
    ir.save(model, path)


def _example_inputs(spec: ModelSpec, segment: Segment) -> dict[str, Tensor]:
    with torch.device("meta"):
        inputs = {
            "hidden_states": torch.empty(2, *spec.latent_shape),
            "timestep": torch.empty(2),
            "class_labels": torch.empty(2, dtype=torch.int64),
        }
        if segment.gate_size:
            inputs["width_gate"] = torch.empty(segment.gate_size)
        if segment.slot_buckets:
            inputs["slots"] = torch.empty(max(segment.slot_buckets[-1], 2))
    return inputs


def _export(module: nn.Module, inputs: Mapping[str, Tensor], segment: Segment) -> ir.Model:
    batch, slots = (
        torch.export.Dim("batch"),
        torch.export.Dim("slots", max=segment.slot_buckets[-1] if segment.slot_buckets else None),
    )
    dynamic = {name: {0: batch} for name in ("hidden_states", "timestep", "class_labels")}
    dynamic |= {"slots": {0: slots}} if "slots" in inputs else {}
    shapes = {name: dynamic.get(name) for name in inputs}
    has_routers = any(path != "all" for path in segment.token_paths)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                kwargs=dict(inputs),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=["sample", "kept_tokens"] if has_routers else ["sample"],
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
                optimize=False,  # would try to read the weights; ``_optimize`` does not
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong in types of its own
        raise ExportError(f"torch cannot export the segment [{segment.start:g}, {segment.end:g}): {error}") from error
    assert program is not None
    return program.model


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as three standard nodes: the form that ONNX Runtime and TensorRT fuse, and opset 20 has no other."""
    if attn_mask is not None or is_causal or enable_gqa or scale != 1.0:
        raise ExportError("only plain attention with the scale folded into its query weights is exported")
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))  # (B, H, N, N)
    return op.MatMul(op.Softmax(scores, axis=-1), value)  # (B, H, N, D)


def _optimize(model: ir.Model, slice_: Slice) -> None:
    """Fold shapes and constants. Weights take no part: they have no values yet."""
    for name in slice_.recipes:
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = None
    onnxscript.optimizer.optimize_ir(model)


def refer_to_store(model: ir.Model, slice_: Slice, layout: StoreLayout) -> None:
    """Turn every weight into a reference into the store. Raises ``ExportError`` for one the slice does not know."""
    for name, value in model.graph.initializers.items():
        recipe = slice_.recipes.get(name)
        if recipe is None:
            if value.const_value is None or value.const_value.nbytes > 4096:
                raise ExportError(f"the exporter made a constant {name!r} that is not a weight of the model")
            continue
        value.const_value = ir.ExternalTensor(
            location=STORE,
            offset=layout.offsets[recipe],
            length=recipe.nbytes,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(recipe.shape),
            name=name,
        )
    missing = slice_.recipes.keys() - model.graph.initializers.keys()
    if missing:
        raise ExportError(f"the exporter dropped or renamed the weight {min(missing)!r}")


def strip_metadata(model: ir.Model) -> None:
    """Remove what the exporter notes about the source code: paths and stack traces, which differ by machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in ir.convenience.create_value_mapping(model.graph).values():
        value.metadata_props.clear()


def check_onnx(path: Path) -> None:
    """``onnx.checker`` on the file and its external data. Raises ``ExportError``."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
