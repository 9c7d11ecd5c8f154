"""The slim torch modules of a bundle: cut again on the meta device, with weights bound to the bundle's store.

Needs no checkpoint and no work directory: widths, plan and model are in the bundle, and the ONNX graph of a network
says where in the store each of its weights is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING
from dyexport.bundle.plan import segment_name
from dyexport.bundle.reader import Bundle
from dyexport.bundle.tables import UnitOrder
from dyexport.compilation.base import BundleNetworks
from dyexport.engines.onnx_file import StoredTensor, read_graph, stored_tensors
from dyexport.errors import BundleError, EngineBuildError
from dyexport.exporters.exported_program import load_stored
from dyexport.slicing.slicer import Slice, SliceContext, dense_segment, slice_conditioning, slice_segment

ONNX = "onnx"


@dataclass(frozen=True, kw_only=True)
class SlimModule:
    """A network of a bundle: its module without weights, and where each weight starts in the store, in bytes."""

    slice: Slice
    offsets: Mapping[str, int]
    store: Path

    def load(self) -> nn.Module:
        """Return the module with weights that are views of the memory-mapped store."""
        return load_stored(self.slice, self.offsets, self.store).eval()


def slim_module(networks: BundleNetworks, network: str, graph: Path) -> SlimModule:
    """Rebuild the module of a network, whose ONNX graph is at ``graph`` with the store next to it.

    Raises ``EngineBuildError`` for a quantized bundle, ``BundleError`` for a graph with other weights than the
    module's.
    """
    if (kind := networks.spec.quantization) is not None:
        raise EngineBuildError(
            f"the bundle is quantized to {kind} in its ONNX graphs, and a torch module has floats; "
            "choose a target made from graphs, such as onnx or tensorrt-rtx"
        )
    slice_ = cut(networks, network)
    stored = stored_tensors(read_graph(graph), graph)
    _check_weights(slice_, stored, graph)
    files = {tensor.span.path for tensor in stored.values()}
    if len(files) != 1:
        raise BundleError(f"{graph} has weights in {len(files)} files instead of one; build the bundle again")
    return SlimModule(
        slice=slice_, offsets={name: tensor.span.offset for name, tensor in stored.items()}, store=files.pop()
    )


def bundle_module(bundle: Bundle, network: str) -> SlimModule:
    """Rebuild the module of a network of an opened bundle. Raises as ``slim_module`` does."""
    paths = bundle.engine_paths(ONNX)
    if network not in paths:
        raise BundleError(f"{bundle.root} has no network {network!r}; it has {', '.join(paths)}")
    return slim_module(BundleNetworks.of(bundle), network, paths[network])


def cut(networks: BundleNetworks, network: str) -> Slice:
    """Cut a network by its name. Raises ``BundleError`` for one that is not in the plan."""
    context = SliceContext.of(networks.spec, networks.widths, networks.stats)
    if network in (DENSE, DENSE_CONDITIONING) and networks.separate_dense:
        spec = context.spec.model_copy(update={"td_lora": None})
        context = replace(context, spec=spec, token_routers=False)
    if network in (CONDITIONING, DENSE_CONDITIONING):
        return slice_conditioning(context)
    segments = {segment_name(index): segment for index, segment in enumerate(networks.plan.segments)}
    segments[DENSE] = dense_segment(context.spec, UnitOrder.of(networks.widths))
    if network not in segments:
        raise BundleError(f"the bundle has no network {network!r}; it has {', '.join(segments)}")
    return slice_segment(context, segments[network])


def _check_weights(slice_: Slice, stored: Mapping[str, StoredTensor], graph: Path) -> None:
    if different := slice_.recipes.keys() ^ stored.keys():
        where = "the graph" if min(different) in stored else "the module"
        raise BundleError(f"{graph}: weight {min(different)} is only in {where}; build the bundle again")
    for name, recipe in slice_.recipes.items():
        dtype, tensor = str(recipe.dtype).removeprefix("torch."), stored[name]
        if (tensor.spec.dtype, tensor.spec.shape) != (dtype, recipe.shape):
            raise BundleError(
                f"{graph}: weight {name} is {tensor.spec.dtype} {list(tensor.spec.shape)} in the graph and {dtype} "
                f"{list(recipe.shape)} in the module; build the bundle again"
            )
        if tensor.span.length != recipe.nbytes:
            raise BundleError(
                f"{graph}: weight {name} has {tensor.span.length} bytes instead of {recipe.nbytes}; build it again"
            )
