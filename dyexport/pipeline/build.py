"""The pipeline from top to bottom: settings to a bundle, and the parts of that which can be run by themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.plan import SegmentPlan
from dyexport.bundle.targets import compiled_targets, plan_targets
from dyexport.compilation.install import finish_install
from dyexport.exporters.plan_cost import PlanCost, estimate_plans
from dyexport.files import check_writable
from dyexport.pipeline import export_stages, model_stages, steps
from dyexport.pipeline.assemble import assemble_bundle
from dyexport.pipeline.calibrate import METRICS, read_calibrated, read_metrics
from dyexport.pipeline.export_stages import CalibratedModel
from dyexport.pipeline.golden import golden_data
from dyexport.pipeline.model_stages import Data
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.work_directory import locked
from dyexport.slicing.store_layout import lay_out
from dyexport.stages.ledger import BuildListener, NullListener, Outcome
from dyexport.stages.locking import locked_output
from dyexport.training.processes import find_process_group


@dataclass(frozen=True, kw_only=True)
class StaticModel:
    """The static model, and the data for training and calibration."""

    static: Outcome
    data: Data


@dataclass(frozen=True, kw_only=True)
class TrainedModel(StaticModel):
    """The dynamic model before calibration, and what it was made from."""

    dynamic: Outcome


@dataclass(frozen=True, kw_only=True)
class PricedPlan:
    """A plan that was not exported, and estimates of its TensorRT plans by target."""

    plan: SegmentPlan
    tensorrt: dict[str, PlanCost]


def make_static_model(run: Run) -> StaticModel:
    """Get the static model from its checkpoint, or train it, or make it at random."""
    run.ledger.check_allowed("static")
    data = model_stages.open_given_data(run)  # before a download
    source = steps.checkpoint_source(run.settings)
    static = model_stages.static_model(run, source, data)
    if data is None:
        data = model_stages.synthetic_data(run, source, static)
    return StaticModel(static=static, data=data)


def finetune_model(run: Run) -> TrainedModel:
    """Attach routers to the static model and train them. Processes other than the main one take part up to here."""
    model = make_static_model(run)
    dynamic = model_stages.dynamic_model(run, model.static, model.data)
    run.leave_group()
    return TrainedModel(static=model.static, data=model.data, dynamic=dynamic)


def train_control(run: Run) -> Outcome:
    """Train the static model plainly for as long as the dynamic one."""
    model = make_static_model(run)
    return model_stages.control_model(run, model.static, model.data)


def calibrate_model(run: Run) -> CalibratedModel:
    """Meet the budget, and read widths and token counts off the routers."""
    model = _calibrated(run)
    headroom = model_stages.fp16_headroom(run, model.calibrated, model.data)
    return replace(model, metrics={**model.metrics, **headroom})


def _calibrated(run: Run) -> CalibratedModel:
    trained = finetune_model(run)
    calibrated = model_stages.calibrated_model(run, trained.static, trained.dynamic, trained.data)
    settings = run.settings
    tables = read_calibrated(calibrated.path, settings.preset, settings.stored_precision, settings.quantize)
    metrics = read_metrics(calibrated.path / METRICS)
    return CalibratedModel(
        static=trained.static, data=trained.data, calibrated=calibrated, tables=tables, metrics=metrics
    )


def price_plans(run: Run, engines: Sequence[int]) -> list[PricedPlan]:
    """Price plans of several numbers of engines; exports nothing."""
    settings, model = run.settings, _calibrated(run)
    plans = [export_stages.priced_plan(settings, model, count) for count in engines]
    return [PricedPlan(plan=priced, tensorrt=_estimates(run, model, priced)) for priced in plans]


def _estimates(run: Run, model: CalibratedModel, priced: SegmentPlan) -> dict[str, PlanCost]:
    networks = export_stages.planned_networks(run.settings, model, priced)
    weights = {network.name: network.slice.nbytes for network in networks}
    targets = plan_targets(run.settings.targets)
    return {target: estimate_plans(weights, run.ledger.seconds_of(target)) for target in targets}


def build_bundle(run: Run) -> Manifest:
    """Make the bundle at ``settings.out``. Raises ``StorageError`` while another build writes there."""
    settings = run.settings
    with locked_output(settings.out):
        finish_install(Path(os.path.realpath(settings.out)))
        for target in compiled_targets(settings.targets):
            export_stages.compiler_of(settings, target)  # raises if it cannot be used, before hours of work
        model = calibrate_model(run)
        plan = export_stages.segment_plan(run, model)
        ranges = export_stages.quantization_ranges(run, model, plan)
        golden = golden_data(run, model, plan, ranges)
        networks = export_stages.planned_networks(settings, model, plan, ranges)
        layout = lay_out(recipe for network in networks for recipe in network.slice.recipes.values())
        store = export_stages.weight_store(run, model, layout)
        graphs = export_stages.onnx_graphs(run, model.spec, plan, networks, layout)
        engines = {
            target: export_stages.compiled_engines(run, target, model, plan, graphs)
            for target in compiled_targets(settings.formats)
        }
        manifest = assemble_bundle(run, model, plan, ranges, store, graphs, engines, golden)
        run.remember_digests()
    return manifest


@contextmanager
def opened(settings: BuildSettings, listener: BuildListener, *, without: frozenset[str] = frozenset()) -> Iterator[Run]:
    """Hold the work directory for a run; stages named in ``without`` are taken from it and never made.

    Records the settings, unless stages are left out. Under ``accelerate launch``, processes other than the main one
    take part in training and then exit. Raises ``StorageError`` if the output cannot be written.
    """
    group = find_process_group()
    if not group.is_main_process:
        finetune_model(Run(settings, NullListener(), without=without, group=group))
        sys.exit(0)
    check_writable(settings.out)
    with locked(settings.work):
        if not without:
            settings.save()
        yield Run(settings, listener, without=without, group=group)
