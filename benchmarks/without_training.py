"""Quality of each budget if nothing is trained: ``--finetune-steps 0``, with and without repair.

A static model is cut to each budget by the importance of its units. The scores are the output error that ``dyexport
build`` prints, and the Frechet distance and the class accuracy of samples, from the same noise for every model.

    python -m benchmarks.without_training

Half an hour on 2 cores; samples that were scored are not sampled again. Writes
benchmarks/results/without_training_sit-digits.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.quality import (
    BUNDLE,
    STATIC,
    Family,
    Protocol,
    Scorer,
    Store,
    Trained,
    default_train_steps,
    scores_by_steps,
    train,
    write_results,
)
from dyexport.backbones.base import Preset
from dyexport.bench.report import as_markdown
from dyexport.console import StageLines, chatter_on_stderr
from dyexport.evaluation.settings import SamplingConfig
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import get_preset

RESULTS = Path(__file__).parent / "results"
DENSE = "dense"
KINDS: Mapping[str, dict[str, Any]] = {
    "dynamic": {"widths": "dynamic"},
    "static": {"widths": "static", "engines": 1},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/rivals/sit-digits"), help="shares its static model")
    parser.add_argument("--model", default="sit-digits")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--train-steps", type=int, help="of the static model; default: its recipe's")
    parser.add_argument("--samples", type=int, default=1800)
    parser.add_argument("--repeats", type=int, default=2, help="evaluations of every model, each from different noise")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 25], help="of sampling")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    steps = options.train_steps or default_train_steps(options.model)
    family = Family(model=options.model, work=options.work, train_steps=steps, finetune_steps=0)
    sampling = SamplingConfig(samples=options.samples, guidance=1.0)
    protocol = Protocol(sampling=sampling, repeats=options.repeats)
    with chatter_on_stderr(), StageLines() as lines:
        static, scorer, store = train(family.static, STATIC, lines), Scorer(family.spec), Store(options.work / "scores")
        rows = [scored(static, DENSE, family, scorer, protocol, options.steps, store, lines)]
        for budget in options.budgets:
            for name, settings in cut(family, static.path, budget).items():
                trained = train(settings, BUNDLE, lines)
                rows.append(scored(trained, name, family, scorer, protocol, options.steps, store, lines))
    whole = {"model": options.model, "train_steps": steps, **asdict(protocol), "steps": options.steps, "rows": rows}
    write_results(options.results / f"without_training_{options.model}.json", whole, markdown(whole))
    print(markdown(whole))


def cut(family: Family, static: Path, budget: float) -> dict[str, BuildSettings]:
    """Return the settings of the models of one budget, by name."""
    whole = get_preset(family.model)
    models: Mapping[str, Preset] = {"": whole, ", not repaired": unrepaired(whole)}
    found = {}
    for kind, changes in KINDS.items():
        for suffix, model in models.items():
            folder = f"untrained-{kind}-{budget:g}{'-unrepaired' if suffix else ''}"
            found[f"{kind}{suffix}"] = family.tuned(folder, static, 0, model=model, budget=budget, **changes)
    return found


def unrepaired(preset: Preset) -> Preset:
    """Return a preset whose recipe repairs nothing."""
    recipe = replace(preset.recipe, calibration=replace(preset.recipe.calibration, repair=0))
    return cast(Preset, replace(preset, name=f"{preset.name}-unrepaired", recipe=recipe))


def scored(
    trained: Trained,
    name: str,
    family: Family,
    scorer: Scorer,
    protocol: Protocol,
    steps: Sequence[int],
    store: Store,
    lines: StageLines,
) -> dict[str, Any]:
    """Return what a model costs, and its scores at each number of steps."""
    manifest = trained.manifest
    return {
        "name": name,
        "flops_ratio": 1.0 if manifest is None else manifest.plan.flops_ratio,
        "output_relative_mse": 0.0 if manifest is None else manifest.metrics["output_relative_mse"],
        "scores": scores_by_steps(trained, family.spec, scorer, protocol, steps, store, lines),
    }


def markdown(whole: Mapping[str, Any]) -> str:
    rows = []
    for row in whole["rows"]:
        cells = [row["name"], f"{row['flops_ratio']:.3f}", f"{row['output_relative_mse']:.4f}"]
        for scores in row["scores"].values():
            cells.append(f"{scores['frechet']:.3f}")
            cells.append(f"{100 * scores['class_accuracy']:.1f} %")
        rows.append(tuple(cells))
    heads = [head for count in whole["steps"] for head in (f"Frechet, {count} steps", f"accuracy, {count} steps")]
    return (
        f"{whole['model']}, nothing trained after the static model ({whole['train_steps']} steps); "
        f"{whole['repeats']} x {whole['sampling']['samples']} samples from the same noise, no guidance. "
        "Output error: mean squared distance to the static model's output over its mean square, as `build` prints.\n\n"
        + as_markdown(("widths", "lambda as run", "output error", *heads), rows)
    )


if __name__ == "__main__":
    main()
