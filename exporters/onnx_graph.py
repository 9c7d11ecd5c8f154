"""Slim modules to ONNX graphs whose weights are references into the store.

Modules are exported from the meta device: no weight is ever in memory here, whatever the model's size.
"""

from __future__ import annotations

import ast
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnxscript import opset20 as op

from dyexport.errors import ExportError
from dyexport.exporters.examples import dynamic_shapes, example_inputs, example_sizes
from dyexport.exporters.operator_gate import MODULE
from dyexport.slicing.recipes import StoreLayout
from dyexport.slicing.slicer import Slice

OPSET = 20
ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
STORE = "weights.bin"
SCOPES = "pkg.torch.onnx.name_scopes"


def export_onnx(slice_: Slice, layout: StoreLayout, path: Path) -> None:
    """Write the graph of a slice to ``path``; its weights are those of ``layout``, in ``weights.bin`` beside it.

    Inputs and outputs are the slice's, symbols staying symbols. Raises ``ExportError``.
    """
    model = _export(slice_, path.stem)
    _optimize(model, slice_)
    refer_to_store(model, slice_, layout)
    strip_metadata(model)
    ir.save(model, path)


def _export(slice_: Slice, name: str) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                slice_.module.eval(),
                kwargs=example_inputs(slice_, example_sizes(slice_)),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes(slice_),
                input_names=[spec.name for spec in slice_.inputs],
                output_names=list(slice_.outputs),
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
                optimize=False,  # would try to read the weights; ``_optimize`` does not
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong in types of its own
        raise ExportError(f"torch cannot export {name}: {error}") from error
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
            constant = value.const_value  # a norm without weights gets a vector of ones
            if constant is None or (constant.nbytes > 4096 and len(constant.shape) > 1):
                raise ExportError(f"the exporter made a constant {name!r} that is not a weight of the model")
            continue
        value.const_value = ir.ExternalTensor(
            location=STORE,
            offset=layout.offsets[recipe],
            length=recipe.nbytes,
            dtype=ONNX_DTYPES[recipe.dtype],
            shape=ir.Shape(recipe.shape),
            name=name,
        )
    missing = slice_.recipes.keys() - model.graph.initializers.keys()
    if missing:
        raise ExportError(f"the exporter dropped or renamed the weight {min(missing)!r}")


def strip_metadata(model: ir.Model) -> None:
    """Remove what the exporter notes about the source code: paths and stack traces, which differ by machine.

    What stays is the name of the module that a node came from.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph.all_nodes():
        module = _module_of(node.metadata_props.get(SCOPES, ""))
        node.metadata_props.clear()
        node.metadata_props.update({MODULE: module} if module else {})
        node.doc_string = None
    for value in ir.convenience.create_value_mapping(model.graph).values():
        value.metadata_props.clear()


def _module_of(scopes: str) -> str:
    """``"['', 'blocks.0', 'blocks.0.fc1', 'linear']"`` is of ``blocks.0.fc1``; the last name is the operation's."""
    names = [name for name in ast.literal_eval(scopes) if name] if scopes else []
    return names[-2] if len(names) > 1 else ""


def check_onnx(path: Path) -> None:
    """``onnx.checker`` on the file and its external data. Raises ``ExportError``."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
