"""Stages from a calibrated model to a bundle: plan, weights, graphs, engines. The ledger records each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dyexport import __version__
from dyexport.bundle.graph_labels import labels_for
from dyexport.bundle.manifest import DENSE_CONDITIONING
from dyexport.bundle.plan import SegmentPlan
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tables import UnitOrder
from dyexport.bundle.targets import ONNX
from dyexport.calibration.quantization import Ranges, Tables
from dyexport.calibration.segments import PlanSettings
from dyexport.compilation.base import BundleNetworks, Compiler
from dyexport.compilation.jobs import compile_jobs, make_jobs
from dyexport.compilation.registry import CompileOptions, get_compiler
from dyexport.errors import UsageError
from dyexport.exporters.onnx_graph import STORE, check_onnx, export_onnx
from dyexport.exporters.weight_store import write_store
from dyexport.pipeline import calibrate
from dyexport.pipeline.calibration_inputs import calibration_inputs
from dyexport.pipeline.model_stages import Data
from dyexport.pipeline.networks import (
    Network,
    OwnDense,
    cut_networks,
    identity,
    labeled_reader,
    plan_for,
    plan_of,
    store_reader,
    with_own_routers,
)
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import BuildSettings
from dyexport.slicing.slicer import SliceContext
from dyexport.slicing.store_layout import StoreLayout
from dyexport.stages.file_records import digest_of
from dyexport.stages.ledger import Outcome

GRAPHS = "graphs"
TIMINGS = "timings"  # folder with timings of TensorRT's kernels, by flavour and version


@dataclass(frozen=True, kw_only=True)
class CalibratedModel:
    """A calibrated model: outcomes of its stages, its tables, and metrics of the calibration."""

    static: Outcome
    data: Data
    calibrated: Outcome
    tables: Tables
    metrics: dict[str, float]
    budget: float | None = None

    @property
    def spec(self) -> ModelSpec:
        """Specification of the model."""
        return self.tables[0]

    @property
    def path(self) -> Path:
        """Directory of the dynamic checkpoint."""
        return self.calibrated.path


def segment_plan(run: Run, model: CalibratedModel, order: UnitOrder | None = None) -> SegmentPlan:
    """Choose the segments of K engines, and merge TD-LoRA where the tolerance allows it.

    ``order`` is the storage order of units of several budgets; None: the one that suits this model.
    """
    settings = run.settings
    chosen: dict[str, Any] = {"engines": settings.engines, "token_path": settings.planned_token_path}
    chosen |= {"precision": settings.stored_precision, "quantize": settings.quantize}
    inputs: dict[str, Any] = {"calibrated": model.calibrated.digest, "dyexport": __version__, **chosen}
    if merges(settings, model):
        inputs |= {"merge_tolerance": settings.merge_tolerance, "data": model.data.digest}
    if order is not None:
        inputs["order"] = asdict(order)

    def make(out: Path) -> None:
        plan = priced_plan(settings, model, settings.engines, order)
        if merges(settings, model):
            noised = calibration_inputs(settings, model.data.source)
            segments, errors = calibrate.merge_lora(settings, model.path, plan.segments, noised)
            plan = plan_of(segments, *model.tables).model_copy(update={"merge_errors": errors})
        out.write_text(plan.model_dump_json(indent=1), encoding="utf-8")

    outcome = run.stage("plan", "plan.json", inputs, make)
    return SegmentPlan.model_validate_json(outcome.path.read_bytes())


def merges(settings: BuildSettings, model: CalibratedModel) -> bool:
    """Return whether TD-LoRA may be merged. Raises ``UsageError`` for a model without TD-LoRA."""
    if settings.merge_tolerance is None:
        return False
    if model.spec.td_lora is None:
        raise UsageError(f"--merge-tolerance does nothing here: {settings.checkpoint} has no TD-LoRA")
    return True


def priced_plan(
    settings: BuildSettings, model: CalibratedModel, engines: int, order: UnitOrder | None = None
) -> SegmentPlan:
    """Plan K engines, with TD-LoRA merged in every segment if merging is on. ``order`` is that of ``segment_plan``."""
    plan = plan_for(*model.tables, PlanSettings(engines=engines, token_path=settings.planned_token_path), order)
    if not merges(settings, model):
        return plan
    return plan_of(tuple(s.model_copy(update={"merged": True}) for s in plan.segments), *model.tables)


def planned_networks(
    settings: BuildSettings,
    model: CalibratedModel,
    plan: SegmentPlan,
    ranges: Outcome | None = None,
    label: str = "",
) -> list[Network]:
    """Cut the networks of a plan: its segments, the conditioning network and, with the baseline, the dense network.

    ``ranges`` is the outcome of ``quantization_ranges``, which quantized networks need. ``label`` is that of one budget
    among several.
    """
    spec, widths, stats = model.tables
    networks = cut_networks(
        SliceContext.of(spec, widths, stats),
        widths,
        plan.segments,
        baseline=settings.baseline,
        own_dense=_own_dense(settings, spec),
    )
    if label:
        networks = [with_own_routers(network, label) for network in networks]
    if ranges is None:
        return networks
    measured = Ranges.read(ranges.path)
    return [replace(network, slice=measured.attach(network.name, network.slice)) for network in networks]


def _own_dense(settings: BuildSettings, spec: ModelSpec) -> OwnDense:
    """Return which weights of the dense network differ from the dynamic model's: training or repair changed them."""
    if settings.repairs:
        return "projections"
    if settings.routers != "trained":
        return "nothing"
    rounded = settings.frozen_precision not in ("fp32", settings.stored_precision)  # as far as the bundle shows it
    if spec.td_lora is None or rounded:
        return "everything"
    return "biases" if spec.td_lora.bias == "all" else "nothing"


def quantization_ranges(run: Run, model: CalibratedModel, plan: SegmentPlan) -> Outcome | None:
    """Measure input ranges of quantized linear layers, and the error; None if nothing is quantized."""
    settings = run.settings
    if settings.quantize is None:
        return None
    inputs = {
        "plan": digest_of(plan.model_dump(mode="json")),
        "model": [model.calibrated.digest, model.static.digest],
        "data": model.data.digest,
        "settings": [settings.quantize, settings.baseline, settings.seed],
    }

    def make(out: Path) -> None:
        noised = calibration_inputs(settings, model.data.source)
        progress = run.progress("ranges")
        calibrate.make_ranges(settings, model.static.path, model.path, plan, model.tables, noised, progress, out)

    return run.stage("ranges", "ranges.json", inputs, make)


def weight_store(run: Run, models: Mapping[str, CalibratedModel], layout: StoreLayout) -> Outcome:
    """Write the file with the weights of all networks; ``models`` are the calibrated ones by the label of their budget.

    They have the same weights, except for their routers.
    """
    places = [(identity(recipe), layout.offsets[recipe]) for recipe in layout.owners]
    calibrated = [model.calibrated.digest for model in models.values()]
    model = next(iter(models.values()))
    inputs = {
        "calibrated": calibrated[0] if len(calibrated) == 1 else calibrated,
        "static": model.static.digest,
        "layout": digest_of(places),
    }

    def make(out: Path) -> None:
        own = _own_dense(run.settings, model.spec)
        static = calibrate.static_weights(own, model.static.path, model.path)
        readers = {label: calibrate.calibrated_reader(each.path, each.spec) for label, each in models.items()}
        read = store_reader(model.spec, labeled_reader(readers), static)
        write_store(layout, read, out, run.progress("weights"))

    return run.stage("weights", f"{GRAPHS}/{STORE}", inputs, make)


def onnx_graphs(
    run: Run, spec: ModelSpec, plan: SegmentPlan, networks: Sequence[Network], layout: StoreLayout
) -> dict[str, Outcome]:
    """Export the ONNX graph of each network. The weight store must exist, since graphs are checked with it."""
    graphs = {}
    for index, network in enumerate(networks):
        stage, labels = f"{ONNX} {network.name}", labels_for(network.name, spec, plan)
        weights = {name: (identity(r), layout.offsets[r]) for name, r in network.slice.recipes.items()}
        inputs = {
            "model": spec.model_dump(mode="json"),
            "labels": dict(labels),
            "segment": network.segment.model_dump(mode="json") if network.segment else None,
            "weights": digest_of(weights),
            "ranges": dict(network.slice.ranges),
            "versions": [__version__, torch.__version__],
        }
        progress = partial(run.progress(stage, "graphs"), index, len(networks))
        make = partial(_export_graph, network, layout, dict(labels), progress)
        graphs[network.name] = run.stage(stage, f"{GRAPHS}/{network.name}.onnx", inputs, make)
    return graphs


def _export_graph(network: Network, layout: StoreLayout, labels: dict[str, str], report: Any, out: Path) -> None:
    report()
    export_onnx(network.slice, layout, out, labels)
    check_onnx(out)


def compiler_of(settings: BuildSettings, target: str) -> Compiler:
    """Return the compiler of a target.

    Raises ``MissingDependencyError`` if its builder is not installed, ``EngineBuildError`` if its GPU is absent.
    """
    return get_compiler(target, CompileOptions(tensorrt=settings.tensorrt), settings.work / TIMINGS)


def compiled_engines(
    run: Run, target: str, model: CalibratedModel, plan: SegmentPlan, graphs: dict[str, Outcome]
) -> dict[str, Outcome]:
    """Compile the graphs of all networks for a target."""
    spec, widths, stats = model.tables
    networks = BundleNetworks(
        spec=spec, plan=plan, widths=widths, stats=stats, separate_dense=DENSE_CONDITIONING in graphs
    )
    jobs = make_jobs(networks, {name: outcome.path for name, outcome in graphs.items()})
    compiler = compiler_of(run.settings, target)
    return compile_jobs(run.ledger, compiler, jobs, run.progress, memory=run.settings.memory, label=run.label)
