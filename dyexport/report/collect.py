"""Gather everything that a report shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyexport import __version__
from dyexport.bench.environment import describe
from dyexport.bench.rows import BenchReport, trusted
from dyexport.bundle.reader import Bundle
from dyexport.evaluation.report import EvalReport
from dyexport.progress import Progress, no_progress
from dyexport.report.contents import Report, Samples, TokenMap
from dyexport.report.costs import StepCosts, step_costs
from dyexport.report.drawing import Chart
from dyexport.report.figures.drift import drift_chart
from dyexport.report.figures.flops import flops_chart
from dyexport.report.figures.latency import latency_chart
from dyexport.report.figures.memory import memory_chart
from dyexport.report.figures.quality import quality_chart
from dyexport.report.figures.timeline import timeline_chart
from dyexport.report.figures.token_counts import token_counts_chart
from dyexport.report.figures.widths import widths_chart
from dyexport.report.headline import headline_of
from dyexport.report.settings import ReportSettings
from dyexport.report.tables import bytes_table, engines_table, environment_table, layers_table, timeline_table
from dyexport.report.trajectory import Trajectory, trajectory_of
from dyexport.report.verified import verified_of
from dyexport.report.width_map import WidthMap

if TYPE_CHECKING:
    from dyexport.verification.report import VerifyReport

POINTS = 128  # cells of the width map


@dataclass(frozen=True, kw_only=True)
class Given:
    """Results of other commands: the verification or the reason why there is none, and files of measurements."""

    verified: VerifyReport | str
    bench: BenchReport | None = None
    evaluation: EvalReport | None = None


def collect(
    bundle: Bundle, settings: ReportSettings, given: Given, command: str, progress: Progress = no_progress
) -> Report:
    """Sample a bundle, compute and draw what its report shows. Raises what ``dyexport.sample`` raises."""
    import torch

    spec, plan = bundle.manifest.model, bundle.manifest.plan
    why: dict[str, str] = {}
    samples, token_map = _pictures(bundle, settings, why, progress)
    trajectory = trajectory_of(spec, plan, settings.steps_for(spec), settings.scheduler)
    costs = step_costs(bundle, trajectory)
    bench = given.bench
    machine = describe("cpu", torch.get_num_threads()) if bench is None else bench.environment
    return Report(
        headline=headline_of(bundle, given.verified, bench),
        samples=samples,
        widths=widths_chart(WidthMap.of(bundle, POINTS)),
        engines=engines_table(bundle),
        token_map=token_map,
        token_counts=token_counts_chart(bundle),
        timeline=timeline_chart(trajectory, len(plan.segments)),
        steps=timeline_table(trajectory, costs, len(plan.segments)),
        measurements=_measurements(bundle, trajectory, costs, given, why),
        layers=(layers_table(bundle), bytes_table(bundle)),
        verified=verified_of(given.verified),
        environment=environment_table(machine, "Made on" if bench is None else "Measured on"),
        command=command,
        version=__version__,
        warnings=(*(bench.warnings if bench else ()), *(given.evaluation.warnings if given.evaluation else ())),
        why=why,
    )


def _pictures(
    bundle: Bundle, settings: ReportSettings, why: dict[str, str], progress: Progress
) -> tuple[Samples | None, TokenMap | None]:
    if not settings.pictures:
        why["samples"] = "Nothing was sampled: --no-samples."
        why["tokens"] = "There is no picture to lay tokens over: --no-samples."
        return None, None
    from dyexport.report.pictures import as_contents, take_samples
    from dyexport.report.token_map import chosen_calls, token_map_of
    from dyexport.report.token_masks import tokens_at

    taken = take_samples(bundle, settings, progress)
    steps = tokens_at(bundle, chosen_calls(taken.calls))
    token_map = None if not steps else token_map_of(bundle.manifest.model, taken, steps)
    if token_map is None:
        why["tokens"] = (
            "This model has no token routers: every token runs in every block."
            if bundle.token_stats is None
            else "The graphs do not tell which tokens ran in a picture; these are the statistics of calibration."
        )
    return as_contents(taken), token_map


def _measurements(
    bundle: Bundle, trajectory: Trajectory, costs: StepCosts, given: Given, why: dict[str, str]
) -> tuple[Chart, ...]:
    bench, evaluation = given.bench, given.evaluation
    charts: list[Chart | None] = [flops_chart(trajectory, costs)]
    if bench is not None:
        charts += [latency_chart(trajectory, bench), memory_chart(bench)]
    else:
        why["bench"] = "Latency and memory: not measured. dyexport bench BUNDLE -o bench.json, then --bench bench.json."
    if evaluation is not None:
        speedup = None if bench is None else trusted(bench.headline.over_dense)
        charts.append(quality_chart(evaluation, speedup, bundle.manifest.plan.network_flops_ratio))
        charts.append(drift_chart(evaluation))
        if charts[-2] is None:
            why["eval"] = "eval had no data to compare samples with, so there are no Frechet distances."
    else:
        why["eval"] = "Quality: not measured. dyexport eval BUNDLE -o eval.json, then --eval eval.json."
    return tuple(chart for chart in charts if chart is not None)
