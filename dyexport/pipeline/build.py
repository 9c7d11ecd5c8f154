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
from dyexport.bundle.tables import UnitOrder
from dyexport.bundle.targets import compiled_targets, plan_targets
from dyexport.compilation.install import finish_install
from dyexport.exporters.plan_cost import PlanCost, estimate_plans
from dyexport.files import check_writable
from dyexport.pipeline import export_stages, model_stages, steps
from dyexport.pipeline.assemble import BudgetParts, assemble_bundle
from dyexport.pipeline.calibrate import METRICS, read_calibrated, read_metrics
from dyexport.pipeline.export_stages import CalibratedModel
from dyexport.pipeline.golden import golden_data
from dyexport.pipeline.model_stages import Data
from dyexport.pipeline.networks import Network
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.work_directory import locked
from dyexport.slicing.store_layout import StoreLayout, lay_out
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

    budget: float | None
    plan: SegmentPlan
    tensorrt: dict[str, PlanCost]


def make_static_model(run: Run) -> StaticModel:
    """Get the static model from its checkpoint, or train it, or make it at random."""
    run = run.whole
    run.ledger.check_allowed("static")
    data = model_stages.open_given_data(run)  # before a download
    source = steps.checkpoint_source(run.settings)
    static = model_stages.static_model(run, source, data)
    if data is None:
        data = model_stages.synthetic_data(run, source, static)
    return StaticModel(static=static, data=data)


def finetune_model(run: Run) -> TrainedModel:
    """Attach routers to the static model and train them. Processes other than the main one take part up to here."""
    run = run.whole
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


def calibrate_models(run: Run) -> list[CalibratedModel]:
    """Calibrate at every budget, the default one first."""
    return [calibrate_model(each) for each in run.by_budget()]


def _calibrated(run: Run) -> CalibratedModel:
    trained = finetune_model(run)
    calibrated = model_stages.calibrated_model(run, trained.static, trained.dynamic, trained.data)
    settings = run.settings
    tables = read_calibrated(calibrated.path, settings.preset, settings.stored_precision, settings.quantize)
    metrics = read_metrics(calibrated.path / METRICS)
    return CalibratedModel(
        static=trained.static,
        data=trained.data,
        calibrated=calibrated,
        tables=tables,
        metrics=metrics,
        budget=settings.budget,
    )


def price_plans(run: Run, engines: Sequence[int]) -> list[PricedPlan]:
    """Price plans of several numbers of engines, at each budget; exports nothing."""
    return [plan for each in run.by_budget() for plan in _price_plans(each, engines)]


def _price_plans(run: Run, engines: Sequence[int]) -> list[PricedPlan]:
    settings, model = run.settings, _calibrated(run)
    plans = [export_stages.priced_plan(settings, model, count) for count in engines]
    return [
        PricedPlan(budget=settings.budget, plan=priced, tensorrt=_estimates(run, model, priced)) for priced in plans
    ]


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
        cuts = _cut(run)
        recipes = [recipe for cut in cuts for each in cut.networks for recipe in each.slice.recipes.values()]
        layout = lay_out(recipes)
        store = export_stages.weight_store(run, {cut.run.label: cut.model for cut in cuts}, layout)
        manifest = assemble_bundle(run, store, [_exported(cut, layout) for cut in cuts])
        run.remember_digests()
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """The networks of one budget, and what they were cut from."""

    run: Run
    model: CalibratedModel
    plan: SegmentPlan
    ranges: Outcome | None
    golden: Outcome
    networks: list[Network]


def _cut(run: Run) -> list[_Cut]:
    """Cut the networks of every budget, the default one first."""
    runs = run.by_budget()
    models = [calibrate_model(each) for each in runs]
    order = UnitOrder.of(*(model.tables[1] for model in models)) if len(models) > 1 else None
    cuts = []
    for each, model in zip(runs, models, strict=True):
        plan = export_stages.segment_plan(each, model, order)
        ranges = export_stages.quantization_ranges(each, model, plan)
        golden = golden_data(each, model, plan, ranges)
        networks = export_stages.planned_networks(each.settings, model, plan, ranges, each.label)
        cuts.append(_Cut(run=each, model=model, plan=plan, ranges=ranges, golden=golden, networks=networks))
    return cuts


def _exported(cut: _Cut, layout: StoreLayout) -> BudgetParts:
    """Export the graphs of one budget, and compile its engines."""
    run, model, plan = cut.run, cut.model, cut.plan
    graphs = export_stages.onnx_graphs(run, model.spec, plan, cut.networks, layout)
    engines = {
        target: export_stages.compiled_engines(run, target, model, plan, graphs)
        for target in compiled_targets(run.settings.formats)
    }
    return BudgetParts(
        run=run, model=model, plan=plan, ranges=cut.ranges, golden=cut.golden, graphs=graphs, engines=engines
    )


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
