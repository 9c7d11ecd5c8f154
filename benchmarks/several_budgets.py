"""One model trained for several budgets, next to models that are trained for one each.

All start from the same static model, are trained for the same number of steps, and are scored from the same noise: the
Frechet distance and the class accuracy of samples, at each number of steps and seed of fine-tuning.

    python -m benchmarks.several_budgets --train-only   # hours on a CPU; goes on where it stopped
    python -m benchmarks.several_budgets                # half an hour the first time, then seconds

Shares models with ``benchmarks.rivals``. Writes benchmarks/results/several_budgets_MODEL.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

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
from dyexport.bench.report import as_markdown
from dyexport.bundle.reader import Bundle
from dyexport.console import StageLines, chatter_on_stderr
from dyexport.evaluation.settings import SamplingConfig
from dyexport.presets import get_preset
from dyexport.stages.file_records import digest_of

RESULTS = Path(__file__).parent / "results"
WEIGHTS = "graphs/weights.bin"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sit-digits")
    parser.add_argument("--work", type=Path, help="folder of models and scores; default: out/rivals/MODEL")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--alone", type=float, nargs="+", help="budgets with a model for each too; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fine-tuning")
    parser.add_argument("--train-steps", type=int, help="of the static model; default: its recipe's")
    parser.add_argument("--finetune-steps", type=int, help="default: the recipe's")
    parser.add_argument("--samples", type=int, default=1800)
    parser.add_argument("--repeats", type=int, default=1, help="evaluations of every model, each from different noise")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 25], help="of sampling")
    parser.add_argument("--train-only", action="store_true", help="train what is missing, and stop")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    family = Family(
        model=options.model,
        work=options.work or Path("out/rivals") / options.model,
        train_steps=options.train_steps or default_train_steps(options.model),
        finetune_steps=options.finetune_steps,
        engines=get_preset(options.model).engines,
        baseline=True,
    )
    with chatter_on_stderr(), StageLines() as lines:
        models = trained_models(family, options.budgets, options.alone or options.budgets, options.seeds, lines)
        if options.train_only:
            return
        protocol = Protocol(sampling=SamplingConfig(samples=options.samples, guidance=1.0), repeats=options.repeats)
        scorer, store = Scorer(family.spec), Store(family.work / "scores")
        rows = []
        for labels, trained in models:
            assert trained.manifest is not None
            scores = scores_by_steps(trained, family.spec, scorer, protocol, options.steps, store, lines)
            rows.append({**labels, "flops_ratio": trained.manifest.plan.flops_ratio, "scores": scores})
    whole = {"model": options.model, **asdict(protocol), "steps": options.steps, "rows": rows, **stored_bytes(models)}
    write_results(options.results / f"several_budgets_{options.model}.json", whole, markdown(whole))
    print(markdown(whole))


def trained_models(
    family: Family, budgets: Sequence[float], alone: Sequence[float], seeds: Sequence[int], lines: StageLines
) -> list[tuple[dict[str, Any], Trained]]:
    """Train what is missing; return each model at each budget, with its labels.

    Budgets in ``alone`` have a model for each too.
    """
    static = train(family.static, STATIC, lines)
    models: list[tuple[dict[str, Any], Trained]] = []
    for seed in seeds:
        names = "-".join(f"{budget:g}" for budget in budgets)
        several = family.tuned(f"several-{names}", static.path, seed, budget=budgets[0], budgets=tuple(budgets))
        train(several, BUNDLE, lines)
        for budget in budgets:
            labels = {"budget": budget, "seed": seed}
            models.append(({**labels, "trained_for": "all"}, _opened(several.out, budget)))
            if budget in alone:
                single = family.tuned(f"dynamic-{budget:g}", static.path, seed, budget=budget)
                models.append(({**labels, "trained_for": "one"}, train(single, BUNDLE, lines)))
    return models


def _opened(root: Path, budget: float) -> Trained:
    bundle = Bundle.open(root, budget=budget)
    digest = digest_of({name: record.sha256 for name, record in bundle.manifest.files.items()})
    return Trained(path=bundle.root, digest=digest, manifest=bundle.manifest)


def stored_bytes(models: Sequence[tuple[Mapping[str, Any], Trained]]) -> dict[str, int]:
    """Return the bytes of the weights of all budgets together, and the most of a single one."""
    sizes: dict[str, list[int]] = {"all": [], "one": []}
    for labels, trained in models:
        assert trained.manifest is not None
        sizes[labels["trained_for"]].append(trained.manifest.files[WEIGHTS].bytes)
    return {"weight_bytes_all": max(sizes["all"]), "weight_bytes_one": max(sizes["one"])}


def markdown(whole: Mapping[str, Any]) -> str:
    cells = {(row["budget"], row["trained_for"], row["seed"]): row for row in whole["rows"]}
    budgets, seeds = sorted({row["budget"] for row in whole["rows"]}), sorted({row["seed"] for row in whole["rows"]})
    rows = []
    for budget in budgets:
        for trained_for in ("all", "one"):
            same = [cells[key] for seed in seeds if (key := (budget, trained_for, seed)) in cells]
            if not same:
                continue
            values = [[row["scores"][str(count)]["frechet"] for row in same] for count in whole["steps"]]
            shown = [f"{mean(each):.3f} ({', '.join(f'{value:.3f}' for value in each)})" for each in values]
            rows.append((f"{budget:g}", trained_for, f"{mean(row['flops_ratio'] for row in same):.3f}", *shown))
    heads = ("budget", "trained for", "lambda as run", *(f"Frechet, {count} steps" for count in whole["steps"]))
    share = whole["weight_bytes_all"] / whole["weight_bytes_one"]
    return (
        f"{whole['model']}: one model for {len(budgets)} budgets, and models for one, fine-tuned for as many steps. "
        f"Frechet distance of {whole['repeats']} x {whole['sampling']['samples']} samples from the same noise: mean "
        f"and values of seeds {', '.join(map(str, seeds))}. Weights of all budgets in one bundle: {share:.2f} of the "
        "largest single one's.\n\n" + as_markdown(heads, rows)
    )


if __name__ == "__main__":
    main()
