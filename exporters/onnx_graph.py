"""Export slim modules to ONNX graphs whose weights are references into the store.

Modules are exported from the meta device: no weight is ever in memory here, whatever the model's size.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
import torch._dynamo.config
import torch.fx.config
from onnx.external_data_helper import ExternalDataInfo
from onnx_ir.passes import common as passes
from onnxscript import opset20 as op
from onnxscript import rewriter
from onnxscript.rewriter.rules import common as rules

from dyexport.bundle.graph_labels import MODULE
from dyexport.errors import ExportError
from dyexport.exporters.examples import dynamic_shapes, example_inputs, example_sizes
from dyexport.exporters.operators import operators_read_once
from dyexport.exporters.qdq import insert_qdq
from dyexport.slicing.slicer import Slice
from dyexport.slicing.store_layout import StoreLayout

OPSET = 20
ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
}
REWRITES = (  # the rules of onnxscript that apply here; running all takes quadratic time
    rules.collapse_slice_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.materialize_reshape_shape_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.squeeze_reshape_1d_rule,
)
STORE = "weights.bin"
SCOPES = "pkg.torch.onnx.name_scopes"


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence everything below an error of these loggers inside the context."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Let torch trace without a stack trace for each node inside the context: that is a tenth of the time of an export.

    ``strip_metadata`` would remove them.
    """
    before = torch.fx.config.do_not_emit_stack_traces
    try:
        torch.fx.config.do_not_emit_stack_traces = True
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


@quiet("torch.onnx", "onnx_ir")
def export_onnx(
    slice_: Slice, layout: StoreLayout, path: Path, labels: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write the graph of a slice to ``path``; weights refer to ``weights.bin`` next to it, laid out by ``layout``.

    Inputs and outputs have the names and symbolic sizes of the slice. ``labels`` are stored as metadata.
    Raises ``ExportError``.
    """
    model = _export(slice_, path.stem)
    _optimize(model, slice_)
    insert_qdq(model, slice_)
    refer_to_store(model, slice_, layout)
    strip_metadata(model)
    model.metadata_props.update(labels)
    ir.save(model, path)


def _export(slice_: Slice, name: str) -> ir.Model:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _translate(slice_)
    except Exception as error:  # the exporter wraps all errors in private types
        raise ExportError(f"torch cannot export {name}: {error}") from error


def _translate(slice_: Slice) -> ir.Model:
    """Trace the module once, and translate its operators without decomposition."""
    shapes = dynamic_shapes(slice_)
    # With symbolic sizes, filling the cache of fake tensors takes longer than it saves.
    without_cache = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with without_cache, without_stack_traces(), operators_read_once():
        traced = torch.export.export(
            slice_.module.eval(),
            (),
            kwargs=example_inputs(slice_, example_sizes(slice_)),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # as torch.onnx does: a guard would exclude a size of 1
        )
        # Every operator of a slim network has an ONNX form, and decomposition would trace the network twice more. The
        # override affects this program only.
        traced.run_decompositions = lambda table: traced
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[spec.name for spec in slice_.inputs],
            output_names=list(slice_.outputs),
            custom_translation_table=TRANSLATIONS,
            optimize=False,  # would try to read the weights; ``_optimize`` does not
            verbose=False,
        )
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
    """Translate attention to standard nodes, in the form that ONNX Runtime and TensorRT fuse.

    Opset 20 has no attention operator. ``attn_mask`` holds floats that are added to the logits.
    """
    if is_causal or enable_gqa or scale != 1.0:
        raise ExportError("only attention with the scale folded into its query weights is exported")
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))  # (B, H, N, N)
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)  # (B, H, N, D)


def cast(value: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    """Translate ``Tensor.to(dtype)``, for which torch.onnx knows only the decomposed operator."""
    return op.Cast(value, to=dtype)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.to.dtype: cast,
}


def _optimize(model: ir.Model, slice_: Slice) -> None:
    """Fold shapes and constants. Weights are not folded: they have no values yet."""
    for name in slice_.recipes:
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = None
    onnxscript.optimizer.inline(model)
    passes.CommonSubexpressionEliminationPass()(model)  # rewriting equal nodes would give two shapes the same name
    for _ in range(2):  # rewriting makes more constants to fold
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, REWRITES)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


def refer_to_store(model: ir.Model, slice_: Slice, layout: StoreLayout) -> None:
    """Turn every weight into a reference into the store. Raises ``ExportError`` for one the slice does not know."""
    for name, value in model.graph.initializers.items():
        recipe = slice_.recipes.get(name)
        if recipe is None:
            constant = value.const_value  # such as the ones of a norm without weights
            if constant is None or (constant.nbytes > 4096 and len(constant.shape) > 1):
                raise ExportError(f"the exporter made a constant {name!r} that is not a weight of the model")
            continue
        value.const_value = ir.ExternalTensor(
            location=STORE,
            offset=layout.offsets[recipe],
            length=recipe.nbytes,
            dtype=ONNX_DTYPES[recipe.stored_dtype],
            shape=ir.Shape(recipe.shape),
            name=name,
        )
    missing = slice_.recipes.keys() - model.graph.initializers.keys()
    if missing:
        raise ExportError(f"the exporter dropped or renamed the weight {min(missing)!r}")


def strip_metadata(model: ir.Model) -> None:
    """Remove paths and stack traces of the source code, which differ by machine.

    Nodes keep the name of the module that they were exported from.
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
    """Return the module in a list of scopes: ``"['', 'blocks.0', 'blocks.0.fc1', 'linear']"`` -> ``blocks.0.fc1``."""
    names = [name for name in ast.literal_eval(scopes) if name] if scopes else []
    return names[-2] if len(names) > 1 else ""


def check_onnx(path: Path) -> None:
    """Check a graph with ``onnx.checker``, and that its weights lie within the store. Raises ``ExportError``.

    The checker requires the store next to the graph and rejects links, so it gets a sparse file of the same length.
    """
    try:
        length = (path.parent / STORE).stat().st_size
        with TemporaryDirectory(prefix="onnx-check-") as directory:
            (Path(directory) / path.name).symlink_to(path.resolve())
            with (Path(directory) / STORE).open("wb") as store:
                store.truncate(length)
            onnx.checker.check_model(f"{directory}/{path.name}", full_check=True)
    except (OSError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if (end := _end(tensor)) > length:
            raise ExportError(f"{path.name} has {tensor.name} end at byte {end} of {STORE}, which has {length}")


def _end(tensor: onnx.TensorProto) -> int:
    """Return the offset at which a tensor ends in the store; 0 if it is in the graph."""
    place = ExternalDataInfo(tensor) if tensor.external_data else None
    return 0 if place is None else (place.offset or 0) + (place.length or 0)
