"""Slim and dense graphs in dyexport's own engines: ONNX Runtime, and TensorRT plans made from the graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.summary import summarize
from benchmarks.gpu.timing import Run, Timing, require_finite
from benchmarks.gpu.with_torch import network_inputs
from dyexport.bundle.graph_forms import AttentionForm
from dyexport.bundle.plan import Segment
from dyexport.bundle.plan_info import ENGINE, Flavour, Profile
from dyexport.engines.base import Engine
from dyexport.engines.registry import EngineOptions, get_backend, make_engines
from dyexport.engines.tensorrt_fit import incompatibility, plan_info
from dyexport.engines.tensorrt_session import Session
from dyexport.errors import EngineMismatchError
from dyexport.exporters.onnx_graph import STORE, export_onnx
from dyexport.exporters.tensorrt_plan import PlanRequest, build_plan
from dyexport.exporters.tensorrt_profiles import largest_topk, profiles_for
from dyexport.slicing.store_layout import StoreLayout, lay_out
from dyexport.tensorrt_api import load_api


def time_onnxruntime(form: AttentionForm, case: Case, timing: Timing, steps: int) -> dict[str, Any]:
    """Time graphs with attention in one form, in CUDA graphs where ONNX Runtime captures them.

    Raises ``EngineMismatchError`` where the installed ONNX Runtime does not run on the device.
    """
    if timing.device != "cpu" and not get_backend("onnx").has_cuda():
        raise EngineMismatchError("the onnxruntime installed here has no CUDA provider; onnxruntime-gpu has")
    with graphs(case) as paths:
        engines = make_engines(
            "onnx", list(paths.values()), EngineOptions(device=timing.device, attention=form, cuda_graphs=True)
        )
        return _timed(case, dict(zip(paths, engines, strict=True)), timing, steps)


def time_tensorrt(flavour: Flavour, case: Case, timing: Timing, steps: int) -> dict[str, Any]:
    """Time plans, whatever their description says of this machine. Raises the vendor's reasons, mapped."""
    load_api(flavour)  # before graphs are written for nothing
    with graphs(case) as paths:
        plans = {name: _plan(flavour, case, name, path, steps) for name, path in paths.items()}
        verdict = incompatibility(next(iter(plans.values())))
        for path in plans.values():
            Session(path, plan_info(path))  # raises the runtime's own reason where it refuses
        if verdict is not None:
            raise EngineMismatchError(f"plans load here, and yet: {verdict}")
        engines = make_engines(flavour, list(plans.values()), EngineOptions(device=timing.device))
        return _timed(case, dict(zip(plans, engines, strict=True)), timing, steps)


@contextmanager
def graphs(case: Case) -> Iterator[dict[str, Path]]:
    """Write ONNX graphs of a case's networks over one store of noise, which exist while the context is open."""
    layout = lay_out(recipe for piece in case.networks.values() for recipe in piece.recipes.values())
    with TemporaryDirectory() as folder:
        write_noise(Path(folder) / STORE, layout)
        paths = {name: Path(folder) / f"{name.replace(' ', '-')}.onnx" for name in case.networks}
        for name, path in paths.items():
            export_onnx(case.networks[name], layout, path)
        yield paths


def write_noise(path: Path, layout: StoreLayout) -> None:
    """Write every tensor in its precision, scaled so that activations stay near their size."""
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for recipe in layout.owners:
            noise = torch.empty(recipe.shape).normal_(std=max(recipe.shape, default=1) ** -0.5, generator=generator)
            file.seek(layout.offsets[recipe])
            file.write(noise.to(recipe.dtype).flatten().view(torch.uint8).numpy().data)


def _plan(flavour: Flavour, case: Case, name: str, graph: Path, steps: int) -> Path:
    """Build a plan for the sizes that are timed and no others."""
    segment = _segment(case, name)
    timed = {**case.sizes, "rows": steps * case.name.batch}
    defaults = profiles_for(case.spec, segment, ())[0]
    profiles = ({symbol: Profile.parse(str(timed.get(symbol, sizes.opt))) for symbol, sizes in defaults.items()},)
    request = PlanRequest(
        flavour=flavour,
        inputs=case.networks[name].inputs,
        profiles=profiles,
        precision=case.spec.precision,
        largest_topk=largest_topk(case.spec, segment, profiles),
    )
    out = graph.with_suffix("")
    build_plan(graph, request, out)
    return out / ENGINE


def _segment(case: Case, name: str) -> Segment | None:
    kind, _, index = name.partition(" ")
    return case.segments[int(index)] if kind == "segment" else None


def _timed(case: Case, engines: dict[str, Engine], timing: Timing, steps: int) -> dict[str, Any]:
    runs: dict[str, Run] = {}
    for name, engine in engines.items():
        inputs = network_inputs(case, name, timing.device, steps)
        assert {spec.name for spec in engine.io.inputs} == inputs.keys()
        require_finite(engine.run(inputs).values())
        runs[name] = partial(engine.run, inputs)
    try:
        return summarize(case, timing.seconds(runs), steps)
    finally:
        for engine in engines.values():
            engine.close()
