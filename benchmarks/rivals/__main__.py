"""The one command; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import benchmarks.rivals
from benchmarks.quality import Family, Protocol, reported
from benchmarks.rivals.bundles import memory_of, open_bundles, time_bundles
from benchmarks.rivals.cache_dit_network import PACKAGE, is_installed, supports
from benchmarks.rivals.costs import flops_of
from benchmarks.rivals.measure import Study, train_all
from benchmarks.rivals.pictures import pictures_of
from benchmarks.rivals.report import Report, publish_summary, write
from benchmarks.rivals.tables import rows_of
from benchmarks.rivals.times import measured_memory, measured_times
from benchmarks.rivals.timing import TimingSettings
from benchmarks.rivals.variants import CACHE_DIT, COMPILE, DENSE, MODELS, Variant, variants_of
from dyexport.bench.environment import describe
from dyexport.bundle.spec import ModelSpec
from dyexport.console import StageLines, chatter_on_stderr
from dyexport.errors import DataError, DyexportError
from dyexport.evaluation.settings import SamplingConfig
from dyexport.presets import get_preset

ROOT = Path(__file__).parents[2]
STEPS = (2, 4, 8, 25, 50)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = " ".join(["python -m benchmarks.rivals", *(sys.argv[1:] if arguments is None else arguments)])
    made = {"command": command, **asdict(describe("cpu", torch.get_num_threads()))}
    try:
        with chatter_on_stderr(), StageLines() as lines:
            report = _time_only(options, lines, made) if options.bundles else _compare(options, lines, made)
        if report is None:
            return
        write(report, options.results)
        print(report.markdown())
        if options.publish:
            publish_summary(report, options.results)
    except DyexportError as error:
        sys.exit(str(error))


def _compare(options: argparse.Namespace, lines: StageLines, made: dict[str, Any]) -> Report | None:
    """Train, score and time all variants of one model; None if it only trains."""
    family = Family(
        model=options.model,
        work=options.work or Path("out") / "rivals" / options.model,
        train_steps=options.train_steps,
        finetune_steps=options.finetune_steps,
        engines=get_preset(options.model).engines,
        baseline=True,
    )
    variants, remarks = _variants(options, family)
    models = train_all(family, variants, options.seeds, lines, training=not options.no_train)
    if options.train_only:
        return None
    if models.static is None:
        raise DataError(f"there is nothing to report: {models.missing[0]}; train without --no-train")
    sampling = SamplingConfig(samples=options.samples, guidance=1.0)
    study = Study(family, models, Protocol(sampling=sampling, repeats=options.repeats), lines)
    points = study.points(variants, options.seeds, options.steps)
    timings, memory = None, {}
    if models.bundles:
        timings = measured_times(family.work, models, points, _timing(options), lines, again=not options.no_time)
        memory = measured_memory(family.work, models, options.batch, lines)
    rows = rows_of(points, options.seeds, dense_gflops=_gflops(study.spec), timings=timings, memory=memory)
    pictures, caption = pictures_of(models, variants, options.seeds) or (None, "")
    return Report(
        model=options.model,
        made=made,
        rows=rows,
        remarks=[*remarks, *models.missing],
        timings=timings,
        sampling=sampling,
        repeats=options.repeats,
        real=study.scorer.frechet_real,
        pictures=pictures,
        caption=caption,
    )


def _time_only(options: argparse.Namespace, lines: StageLines, made: dict[str, Any]) -> Report:
    """Time bundles that are there."""
    bundles, settings = open_bundles(options.bundles), _timing(options)
    with reported(lines, "times") as advance:
        points, timings = time_bundles(bundles, options.steps, settings, advance)
    spec = next(iter(bundles.values())).manifest.model
    memory = memory_of(bundles, settings.batch)
    rows = rows_of(points, (), dense_gflops=_gflops(spec), timings=timings, memory=memory)
    return Report(model=spec.name, made=made, rows=rows, remarks=(), timings=timings)


def _timing(options: argparse.Namespace) -> TimingSettings:
    return TimingSettings(batch=options.batch, rounds=options.rounds, compiled=COMPILE in options.models)


def _gflops(spec: ModelSpec) -> float:
    return flops_of(spec).dense / 1e9


def _variants(options: argparse.Namespace, family: Family) -> tuple[list[Variant], list[str]]:
    """Return the variants of the options, and sentences about those that cannot be."""
    names, remarks = {DENSE, *options.models}, []
    if CACHE_DIT in names and not is_installed():
        names.remove(CACHE_DIT)
        remarks.append(f"{CACHE_DIT} is left out: {PACKAGE} is not installed; run: pip install 'dyexport[rivals]'")
    elif CACHE_DIT in names and not supports(family.spec):
        names.remove(CACHE_DIT)
        remarks.append(f"{CACHE_DIT} is left out: {family.model} is not diffusers' DiTTransformer2DModel")
    return list(variants_of(names, options.budgets, options.shares)), remarks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description=benchmarks.rivals.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="sit-digits", help="preset that trains from scratch")
    parser.add_argument("--bundles", type=Path, nargs="+", help="instead of --model: only time these, all of one model")
    parser.add_argument("--work", type=Path, help="folder of models and scores; default: out/rivals/MODEL")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="dense is always there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fine-tuning")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="of sampling")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3], help="lambda of slim networks")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3], help="of evaluations under a cache")
    parser.add_argument("--train-steps", type=int, help="of the static model; default: its recipe's")
    parser.add_argument("--finetune-steps", type=int, help="of all others; default: the recipe's")
    parser.add_argument("--samples", type=int, default=1800, help="pictures of one evaluation")
    parser.add_argument("--repeats", type=int, default=1, help="evaluations of every variant, from different noise")
    parser.add_argument("--batch", type=int, default=64, help="of timed calls")
    parser.add_argument("--rounds", type=int, default=10, help="of alternating blocks")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch and of ONNX Runtime; pools of several engines spin"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="train what is missing, and stop")
    only.add_argument("--no-train", action="store_true", help="report what is there, list what is missing")
    parser.add_argument("--no-time", action="store_true", help="keep the times of the last run of the same engines")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of tables and the chart"
    )
    parser.add_argument("--publish", action="store_true", help="put summary and chart into README and docs")
    return parser


if __name__ == "__main__":
    main()
