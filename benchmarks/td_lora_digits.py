"""Does TD-LoRA train as well as full fine-tuning? Digits at lambda 0.5 from one static model, all else equal.

Full fine-tuning, TD-LoRA with less than 5 % of its trainable parameters, without biases and with them, and the static
LoRA of the same rank. All are sampled and judged alike, several times from the same noise.

    python benchmarks/td_lora_digits.py --train-steps 10000 --work out/td-lora-digits

Takes about an hour on a core for each seed. Stop it at any time: the same command goes on where it stopped. Writes
benchmarks/results/td_lora_sit-digits_10000.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dyexport.bench.evaluation import Drawing, mean_accuracy, mean_frechet, score_models
from dyexport.bench.quality import Judge
from dyexport.bench.report import as_markdown
from dyexport.build.ledger import digest_of
from dyexport.build.pipeline import opened
from dyexport.build.settings import FROM_SCRATCH, BuildSettings
from dyexport.console import StageLines, chatter_on_stderr
from dyexport.demo import real_digits
from dyexport.files import write_atomically
from dyexport.lora import parse_lora
from dyexport.runtime.pipeline import load

RESULTS = Path(__file__).parent / "results"
FULL = "full"
RUNS = ("rank=1,experts=4", "rank=1,experts=2,bias=all", "rank=1,experts=1,bias=all")
GOAL = 1.1  # TD-LoRA's Frechet distance over full fine-tuning's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/td-lora-digits"))
    parser.add_argument("--model", default="sit-digits")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--runs", nargs="+", default=RUNS, help=f"after '{FULL}': what --td-lora takes")
    parser.add_argument("--seeds", type=int, default=1, help="fine-tuning runs of each")
    parser.add_argument("--train-steps", type=int, default=FROM_SCRATCH.steps, help="of the static model")
    parser.add_argument("--finetune-steps", type=int)
    parser.add_argument("--samples", type=int, default=5400)
    parser.add_argument("--draws", type=int, default=3, help="of every model, each from noise of its own")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    drawing = Drawing(samples=options.samples, steps=options.steps)
    base = BuildSettings(
        model=options.model,
        budget=options.budget,
        out=options.work / "static",
        work=options.work / "static.work",
        train_steps=options.train_steps,
        finetune_steps=options.finetune_steps,
    )
    with chatter_on_stderr(), StageLines() as lines, opened(base, lines) as pipeline:
        static = pipeline.static.path
    runs = [
        score_run(fine_tuning(base, static, name, seed), name, drawing, options.draws)
        for seed in range(options.seeds)
        for name in (FULL, *options.runs)
    ]
    file = options.results / f"td_lora_{options.model}_{options.train_steps}.json"
    write_results(file, runs, drawing, options.model, options.train_steps)


def fine_tuning(base: BuildSettings, static: Path, name: str, seed: int) -> BuildSettings:
    out = base.out.with_name(f"{name.replace(',', '-').replace('=', '')}-seed{seed}")
    return replace(
        base,
        out=out,
        work=out.with_name(f"{out.name}.work"),
        checkpoint=str(static),
        train_steps=None,
        td_lora=None if name == FULL else parse_lora(name),
        seed=seed,
    )


def score_run(settings: BuildSettings, name: str, drawing: Drawing, draws: int) -> dict[str, Any]:
    """Build and judge; what was judged before is read back."""
    with chatter_on_stderr(), StageLines() as lines, opened(settings, lines) as pipeline:
        manifest = pipeline.bundle()
        key = digest_of([manifest.model_dump(mode="json"), asdict(drawing), draws])
        saved = settings.work / "score.json"
        if saved.exists() and (score := json.loads(saved.read_text()))["key"] == key:
            return dict(score)
        lines.started("eval", f"{name}, seed {settings.seed}")
        loaded = load(settings.out, check_hashes=False)
        judge = Judge(real_digits("train"))
        advance = lambda done, total: lines.advanced("eval", done, total)  # noqa: E731
        found = score_models({name: loaded}, manifest.model, judge, drawing, range(draws), advance)[name]
        loaded.close()
        trained = {part: manifest.metrics[f"{part}"] for part in ("trainable_parameters", "trainable_share")}
        score = {
            "key": key,
            "run": name,
            "seed": settings.seed,
            "flops_ratio": manifest.plan.flops_ratio,
            **trained,
            "frechet": mean_frechet(found),
            "class_accuracy": mean_accuracy(found),
            "draws": [asdict(each) for each in found],
        }
        write_atomically(saved, json.dumps(score, indent=1).encode())
    return score


def write_results(file: Path, runs: Sequence[dict[str, Any]], drawing: Drawing, model: str, train_steps: int) -> None:
    """And, beside it, the same as a table."""
    names = list(dict.fromkeys(run["run"] for run in runs))
    mean = {name: mean_of(runs, name) for name in names}
    whole = {"model": model, "train_steps": train_steps, "drawing": asdict(drawing), "mean": mean, "runs": runs}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(whole, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown(whole).encode())
    print(markdown(whole))


def mean_of(runs: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    mine = [run for run in runs if run["run"] == name]
    values = ("frechet", "class_accuracy", "flops_ratio", "trainable_parameters", "trainable_share")
    return {value: fmean(run[value] for run in mine) for value in values}


def markdown(whole: Mapping[str, Any]) -> str:
    """The table, every run in it: also where TD-LoRA loses."""
    rows: list[tuple[str, ...]] = []
    for name, mean in whole["mean"].items():
        share = f"{mean['trainable_parameters']:.0f} ({100 * mean['trainable_share']:.2f} %)"
        ratio = mean["frechet"] / whole["mean"][FULL]["frechet"]
        each = ", ".join(f"{run['frechet']:.3f}" for run in whole["runs"] if run["run"] == name)
        accuracy = f"{100 * mean['class_accuracy']:.1f} %"
        rows.append((name, share, f"{mean['frechet']:.3f} ({each})", f"{ratio:.2f}", accuracy))
    titles = ("fine-tuning", "trainable", "Frechet (each seed)", "over full", "class accuracy")
    draws = f"{len(whole['runs'][0]['draws'])} draws of {whole['drawing']['samples']} samples"
    return (
        f"{whole['model']} at lambda 0.5, {draws}, {whole['drawing']['steps']} steps; "
        f"Frechet distance to the training digits. The static model was trained for {whole['train_steps']} steps. "
        f"The goal is at most {GOAL} of full fine-tuning with less than 5 % trainable.\n\n" + as_markdown(titles, rows)
    )


if __name__ == "__main__":
    main()
