"""From settings to a bundle: the stages in order, each recorded in the ledger."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from dyexport import __version__
from dyexport.bundle.graph_labels import labels_for
from dyexport.bundle.manifest import Manifest, SegmentPlan
from dyexport.bundle.reader import RANGES, TOKENS, WIDTHS
from dyexport.calibration.quantization import Ranges
from dyexport.calibration.segments import PlanSettings
from dyexport.digests import sha256_of
from dyexport.errors import UsageError
from dyexport.exporters.onnx_graph import STORE, check_onnx, export_onnx
from dyexport.exporters.plan_cost import PlanCost, estimate_plans
from dyexport.exporters.tensorrt_profiles import plan_request
from dyexport.exporters.torch_program import build_program
from dyexport.exporters.weight_store import write_store
from dyexport.files import check_writable
from dyexport.pipeline import reference
from dyexport.pipeline.assemble import Source, assemble, describe_bundle
from dyexport.pipeline.ledger import (
    BuildListener,
    NullListener,
    Outcome,
    Stage,
    digest_of,
    digest_of_spans,
    locked,
)
from dyexport.pipeline.model_stages import ModelStages
from dyexport.pipeline.networks import (
    Network,
    OwnDense,
    cut_networks,
    identity,
    plan_for,
    plan_of,
    store_reader,
)
from dyexport.pipeline.output import locked_output
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.targets import ONNX, TARGETS
from dyexport.pipeline.workers import WorkerPool, max_workers
from dyexport.slicing.recipes import StoreLayout, lay_out
from dyexport.slicing.slicer import SliceContext
from dyexport.tensorrt_api import Api, load_api
from dyexport.training.processes import SingleProcess, find_process_group

GRAPHS = "graphs"
ENGINES = "engines"
TIMINGS = "timings"  # of TensorRT's kernels, by flavour and version


class Pipeline(ModelStages):
    """From the calibrated model on: the plan, the networks, their store and formats, the bundle."""

    @cached_property
    def plan(self) -> SegmentPlan:
        """Segments for K engines."""
        settings: dict[str, Any] = {"engines": self.settings.engines, "token_path": self.settings.planned_token_path}
        settings |= {"precision": self.settings.stored_precision, "quantize": self.settings.quantize}
        inputs: dict[str, Any] = {"calibrated": self.calibrated.digest, "dyexport": __version__, **settings}
        if self._merges:
            inputs |= {"merge_tolerance": self.settings.merge_tolerance, "data": self._data_digest}
        outcome = self._run("plan", "plan.json", inputs, self._make_plan)
        return SegmentPlan.model_validate_json(outcome.path.read_bytes())

    def _make_plan(self, out: Path) -> None:
        plan = self.priced(self.settings.engines)
        if self._merges:
            path, inputs = self.calibrated.path, self.calibration_inputs("plan")
            segments, errors = reference.merge_lora(self.settings, path, plan.segments, inputs)
            plan = plan_of(segments, *self.tables).model_copy(update={"merge_errors": errors})
        out.write_text(plan.model_dump_json(indent=1), encoding="utf-8")

    @property
    def _merges(self) -> bool:
        """Return whether TD-LoRA may be merged. Raises ``UsageError`` for a model without TD-LoRA."""
        asked = self.settings.merge_tolerance is not None
        if asked and self.tables[0].td_lora is None:
            raise UsageError(f"--merge-tolerance does nothing here: {self.settings.checkpoint} has no TD-LoRA")
        return asked

    def priced(self, engines: int) -> SegmentPlan:
        """The plan for K engines and what it costs, every segment merged if any is to be; exports nothing."""
        plan = plan_for(*self.tables, PlanSettings(engines=engines, token_path=self.settings.planned_token_path))
        if not self._merges:
            return plan
        return plan_of(tuple(s.model_copy(update={"merged": True}) for s in plan.segments), *self.tables)

    @cached_property
    def networks(self) -> list[Network]:
        """What is exported."""
        return self._networks_of(self.plan)

    def _networks_of(self, plan: SegmentPlan) -> list[Network]:
        """The plan's segments, their conditioning and, unless it is left out, the dense baseline."""
        spec, widths, stats = self.tables
        networks = cut_networks(
            SliceContext.of(spec, widths, stats),
            widths,
            plan.segments,
            baseline=self.settings.baseline,
            own_dense=self._own_dense,
        )
        if self.ranges is None:
            return networks
        ranges = Ranges.read(self.ranges.path)
        return [replace(network, slice=ranges.attach(network.name, network.slice)) for network in networks]

    @cached_property
    def ranges(self) -> Outcome | None:
        """Ranges of what quantized linear layers read, and what quantization costs; None where nothing is quantized."""
        if self.settings.quantize is None:
            return None
        inputs = {
            "plan": digest_of(self.plan.model_dump(mode="json")),
            "model": [self.calibrated.digest, self.static.digest],
            "data": self._data_digest,
            "settings": [self.settings.quantize, self.settings.baseline, self.settings.seed],
        }

        def make(out: Path) -> None:
            static, calibrated, drawn = self.static.path, self.calibrated.path, self.calibration_inputs("ranges")
            reference.make_ranges(self.settings, static, calibrated, self.plan, self.tables, drawn, out)

        return self._run("ranges", "ranges.json", inputs, make)

    @property
    def _own_dense(self) -> OwnDense:
        """Fine-tuning moves the backbone, beside TD-LoRA at most its biases; the baseline is the model as it was."""
        if self.settings.routers != "trained":
            return "nothing"
        lora = self.tables[0].td_lora
        if lora is None:
            return "everything"
        return "biases" if lora.bias == "all" else "nothing"

    @cached_property
    def layout(self) -> StoreLayout:
        return lay_out(recipe for network in self.networks for recipe in network.slice.recipes.values())

    @cached_property
    def store(self) -> Outcome:
        """The weight store."""
        places = [(identity(recipe), self.layout.offsets[recipe]) for recipe in self.layout.owners]
        inputs = {"calibrated": self.calibrated.digest, "static": self.static.digest, "layout": digest_of(places)}
        return self._run("weights", f"{GRAPHS}/{STORE}", inputs, self._make_store)

    def _make_store(self, out: Path) -> None:
        static = reference.static_weights(self._own_dense, self.static.path, self.calibrated.path)
        spec = self.tables[0]
        read = store_reader(spec, reference.calibrated_reader(self.calibrated.path, spec), static)
        write_store(self.layout, read, out, partial(self.listener.advanced, "weights"))

    @cached_property
    def graphs(self) -> dict[str, Outcome]:
        """The ONNX graph of every network."""
        self.store  # noqa: B018  # graphs are checked with their weights beside them
        return {n.name: self._graph(ONNX, n, place) for place, n in enumerate(self.networks)}

    @cached_property
    def plans(self) -> dict[tuple[str, str], Outcome]:
        """TensorRT plans, by target and network."""
        return {(target, name): o for target in self._plan_targets for name, o in self._plans_for(target).items()}

    @property
    def _plan_targets(self) -> list[str]:
        return [target for target in self.settings.formats if TARGETS[target].flavour]

    def predicted(self, plan: SegmentPlan) -> dict[str, PlanCost]:
        """What TensorRT plans of a segment plan would take, by target."""
        weights = {network.name: network.slice.nbytes for network in self._networks_of(plan)}
        return {target: estimate_plans(weights, self._build_seconds(target)) for target in self._plan_targets}

    def _build_seconds(self, target: str) -> dict[str, float]:
        """Return the seconds that plans of this work directory took, by network."""
        prefix = f"{target} "
        timed = {name: record.seconds for name, record in self.ledger.records.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): seconds for name, seconds in timed.items() if seconds is not None}

    def _plans_for(self, target: str) -> dict[str, Outcome]:
        """Side by side, unless the builder times kernels on a GPU, where others would disturb it."""
        count = max_workers([network.slice.nbytes for network in self.networks], self.settings.memory)
        crew = WorkerPool(1 if self._builder(target).measures else count)
        stages = {network.name: self._plan_stage(target, network, crew) for network in self.networks}
        outcomes = crew.run([partial(self.ledger.run, stage) for stage in stages.values()])
        return dict(zip(stages, outcomes, strict=True))

    def _builder(self, target: str) -> Api:
        """Raises ``MissingDependencyError`` where it is not installed, ``EngineBuildError`` where its GPU is absent."""
        flavour = TARGETS[target].flavour
        assert flavour is not None
        return load_api(flavour)

    def _plan_stage(self, target: str, network: Network, crew: WorkerPool) -> Stage:
        """Made again where its graph, its own weights, its sizes or the builder changed."""
        from dyexport.exporters.tensorrt_plan import build_plan

        graph, flavour = self.graphs[network.name], TARGETS[target].flavour
        assert flavour is not None
        request = plan_request(self.settings.tensorrt, flavour, self.tables[0], network.segment, network.slice)
        inputs = {
            "graph": graph.digest,
            "weights": self._weights_digest(network),
            "builder": self._builder(target).version,
            "request": digest_of(repr(request)),
        }
        stage = f"{target} {network.name}"
        timings = self.settings.work / TIMINGS / f"{target}-{inputs['builder']}"

        def make(out: Path) -> None:
            if TARGETS[target].from_modules:
                build_program(network.slice, self.layout, self.store.path, request, out)
                return
            progress = partial(self.listener.advanced, stage)
            crew.call(stage, build_plan, graph.path, request, out, timings, progress=progress)

        return Stage(name=stage, output=f"{ENGINES}/{target}/{network.name}", inputs=inputs, make=make)

    def _weights_digest(self, network: Network) -> str:
        """Of the bytes in the store that one network reads."""
        spans = {(self.layout.offsets[recipe], recipe.nbytes) for recipe in network.slice.recipes.values()}
        return digest_of_spans(self.store.path, sorted(spans))

    def _graph(self, target: str, network: Network, place: int) -> Outcome:
        """The ``place`` is that among all networks."""
        spec, stage = self.tables[0], f"{target} {network.name}"
        labels = labels_for(network.name, spec, self.plan)
        weights = {name: (identity(r), self.layout.offsets[r]) for name, r in network.slice.recipes.items()}
        inputs = {
            "model": spec.model_dump(mode="json"),
            "labels": dict(labels),
            "segment": network.segment.model_dump(mode="json") if network.segment else None,
            "weights": digest_of(weights),
            "ranges": dict(network.slice.ranges),
            "versions": [__version__, torch.__version__],
        }

        def make(out: Path) -> None:
            self.listener.advanced(stage, place, len(self.networks), "graphs")
            export_onnx(network.slice, self.layout, out, labels)
            check_onnx(out)

        name = f"{network.name}.onnx"
        return self._run(stage, f"{GRAPHS}/{name}", inputs, make)

    def bundle(self) -> Manifest:
        """Everything, assembled at ``settings.out``. Raises ``StorageError`` while another build writes there."""
        with locked_output(self.settings.out):
            manifest = self._bundle()
            self._settle()
        return manifest

    def _settle(self) -> None:
        """Remember every file's digest, now that all are older than the clock's ticks: the next build reads none."""
        for outcome in self.ledger.outcomes.values():
            for name in outcome.files:
                sha256_of(outcome.path / name)

    def _bundle(self) -> Manifest:
        for target in self._plan_targets:
            self._builder(target)  # before hours of work for one that is not there
        self.headroom  # noqa: B018  # before anything is written in a precision that will not do
        moved = self.store.files["."].bytes >= self.settings.link_store_from
        files = {f"{GRAPHS}/{STORE}": Source.of(self.store, moved=moved)}
        files |= {name: Source.of(self.calibrated, name) for name in (WIDTHS, TOKENS) if name in self.calibrated.files}
        files |= {f"{GRAPHS}/{outcome.path.name}": Source.of(outcome) for outcome in self.graphs.values()}
        engines = {(ONNX, name): f"{GRAPHS}/{outcome.path.name}" for name, outcome in self.graphs.items()}
        for (target, name), outcome in self.plans.items():
            files |= {f"{ENGINES}/{target}/{name}/{part}": Source.of(outcome, part) for part in outcome.files}
            engines[target, name] = f"{ENGINES}/{target}/{name}/{TARGETS[target].file}"
        spec, plan = self.tables[0], self.plan
        if self.ranges is not None:
            files[RANGES] = Source.of(self.ranges)
            plan = plan.model_copy(update={"quantization_errors": Ranges.read(self.ranges.path).errors})
        manifest = describe_bundle(self.settings, spec, plan, files, engines, self.calibrated, self.metrics)
        begin = perf_counter()
        reused = assemble(self.settings.out, manifest, files)
        spent = perf_counter() - begin
        outcome = Outcome(
            path=self.settings.out,
            files=manifest.files,
            digest=digest_of(manifest.model_dump(mode="json")),
            reused=reused,
            seconds=spent,
            made_in=None if reused else round(spent, 3),
        )
        self.ledger.note("bundle", outcome)
        return manifest


@contextmanager
def opened(
    settings: BuildSettings, listener: BuildListener, *, without: frozenset[str] = frozenset()
) -> Iterator[Pipeline]:
    """The pipeline, its work directory held and its output found writable.

    Started by ``accelerate launch``, all processes train; then the leader goes on alone and the others exit.
    """
    team = find_process_group()
    if not team.leads:
        Pipeline(settings, NullListener(), without=without, team=team).dynamic  # noqa: B018
        sys.exit(0)
    check_writable(settings.out)
    with locked(settings.work):
        pipeline = Pipeline(settings, listener, without=without, team=team)
        if not without:
            settings.save()
        if not isinstance(team, SingleProcess):
            pipeline.dynamic  # noqa: B018
            pipeline.ledger.team = SingleProcess()
        yield pipeline
