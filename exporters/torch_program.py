"""Compile slim modules with Torch-TensorRT to exported programs. Untested on a GPU.

Operators that TensorRT does not support run in torch inside the same program. A program includes its weights, and is
compiled from the module instead of its ONNX graph. Everything up to ``export_program`` works without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dyexport.bundle.plan_info import INFO, PROGRAM, PlanInfo
from dyexport.bundle.tensors import TensorSpec
from dyexport.digests import sha256_of
from dyexport.errors import EngineBuildError
from dyexport.exporters.exported_program import export_program, outputs_of
from dyexport.exporters.tensorrt_plan import PlanRequest, Profiles, size_range
from dyexport.slicing.slicer import Slice
from dyexport.tensorrt_api import load_api


def build_program(
    slice_: Slice, offsets: Mapping[str, int], store: Path, request: PlanRequest, graph_sha256: str, out: Path
) -> PlanInfo:
    """Write the program of a network and its description into the directory ``out``.

    ``graph_sha256`` is the hash of the network's ONNX graph, which names the same weights.
    Raises ``MissingDependencyError`` without Torch-TensorRT, ``EngineBuildError`` without a GPU or for a request
    that it cannot meet.
    """
    api = load_api(request.flavour)
    if len(request.profiles) != 1 or request.compute_capabilities:
        raise EngineBuildError(
            "--target torch-tensorrt builds for one --profile and for the GPU of this machine; "
            "give at most one, and leave --compute-capability out"
        )
    program = export_program(slice_, offsets, store, device="cuda")
    inputs = [compiled_input(api.trt, spec, request.profiles[0]) for spec in slice_.inputs]
    try:
        compiled = api.trt.dynamo.compile(program, arg_inputs=inputs, use_explicit_typing=True)
        out.mkdir()
        api.trt.save(compiled, str(out / PROGRAM), retrace=False)  # its graph has the dynamic sizes
    except Exception as error:  # raised by many libraries
        raise EngineBuildError(f"Torch-TensorRT cannot compile the network: {error}") from error
    info = PlanInfo(
        flavour=request.flavour,
        version=api.version,
        compute_capabilities=api.own_capabilities(),
        precision=request.precision,
        profiles=tuple(dict(profiles) for profiles in request.profiles),
        inputs=slice_.inputs,
        outputs=outputs_of(program, slice_),
        layers=tuple(f"{node.op} {node.target}" for node in compiled.graph.nodes),
        graph_sha256=graph_sha256,
        plan_sha256=sha256_of(out / PROGRAM),
    )
    (out / INFO).write_text(info.model_dump_json(indent=1), encoding="utf-8")
    return info


def compiled_input(torch_tensorrt: Any, spec: TensorSpec, profiles: Profiles) -> Any:
    """Describe an input and its sizes for Torch-TensorRT."""
    dtype = getattr(torch, spec.dtype)
    ranges = [size_range(size, spec, profiles) for size in spec.shape]
    low, best, high = (tuple(getattr(size, end) for size in ranges) for end in ("min", "opt", "max"))
    if low == high:
        return torch_tensorrt.Input(shape=best, dtype=dtype)
    return torch_tensorrt.Input(min_shape=low, opt_shape=best, max_shape=high, dtype=dtype)
