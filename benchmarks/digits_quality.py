"""Does width that follows t cost quality? Digits at lambda 0.5 against the static model trained as long, three seeds.

One static model is trained from scratch; from it, for each seed, a dynamic model is fine-tuned and the
control is trained for as many steps on the same batches. All are then sampled and judged alike, several times
from the same noise: with thousands of pictures the noise alone moves a model's score by as much as a seed does.

    python benchmarks/digits_quality.py --train-steps 10000 --work out/digits-quality

Takes about two hours on 2 cores. Stop it at any time: the same command goes on where it stopped. Writes
benchmarks/results/sit-digits_quality_10000.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dyexport.bench.evaluation import Drawing, evaluate
from dyexport.bench.quality import Judge
from dyexport.bench.report import as_markdown
from dyexport.build.ledger import digest_of
from dyexport.build.pipeline import opened
from dyexport.build.settings import FROM_SCRATCH, BuildSettings
from dyexport.bundle import Bundle
from dyexport.console import StageLines, chatter_on_stderr
from dyexport.demo import real_digits
from dyexport.files import write_atomically

RESULTS = Path(__file__).parent / "results"
VALUES = ("frechet_dense", "frechet_control", "frechet_dynamic", "class_accuracy", "flops_ratio", "network_flops_ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/digits-quality"))
    parser.add_argument("--model", default="sit-digits")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning runs")
    parser.add_argument("--train-steps", type=int, default=FROM_SCRATCH.steps, help="of the static model")
    parser.add_argument("--finetune-steps", type=int)
    parser.add_argument("--samples", type=int, default=5400, help="pictures in a draw")
    parser.add_argument("--draws", type=int, default=3, help="of every model, each from noise of its own")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    drawing = Drawing(samples=options.samples, steps=options.steps)
    first = BuildSettings(
        model=options.model,
        budget=options.budget,
        out=options.work / "seed-0",
        work=options.work / "seed-0.work",
        train_steps=options.train_steps,
        finetune_steps=options.finetune_steps,
    )
    runs = [run_seed(first, seed, drawing, options.draws) for seed in range(options.seeds)]
    write_results(options.results / f"{options.model}_quality_{options.train_steps}.json", runs, options.train_steps)


def run_seed(first: BuildSettings, seed: int, drawing: Drawing, draws: int) -> dict[str, Any]:
    """Build and judge one seed; what was judged before is read back."""
    settings = first if seed == 0 else _from_same_static(first, seed)
    with chatter_on_stderr(), StageLines() as lines, opened(settings, lines) as pipeline:
        manifest = pipeline.bundle()
        control = pipeline.control
        key = digest_of([manifest.model_dump(mode="json"), control.digest, asdict(drawing), draws])
        saved = settings.work / "score.json"
        if saved.exists() and (score := json.loads(saved.read_text()))["key"] == key:
            return dict(score)
        judge = Judge(real_digits("train"))
        lines.started("eval", f"seed {seed}")
        report = evaluate(
            Bundle.open(settings.out),
            control.path,
            judge,
            real_digits("held-out"),
            drawing,
            range(draws),
            lambda done, total: lines.advanced("eval", done, total),
        )
        score = {"key": key, "seed": seed, **asdict(report)}
        write_atomically(saved, json.dumps(score, indent=1).encode())
    return score


def _from_same_static(first: BuildSettings, seed: int) -> BuildSettings:
    work = first.work.with_name(f"seed-{seed}.work")
    static = str(first.work / "static")
    return replace(
        first, seed=seed, out=first.out.with_name(f"seed-{seed}"), work=work, checkpoint=static, train_steps=None
    )


def write_results(file: Path, runs: list[dict[str, Any]], train_steps: int) -> None:
    """And, beside it, the same as a table."""
    summary: dict[str, Any] = {name: fmean(run[name] for run in runs) for name in VALUES}
    summary["frechet_real"] = runs[0]["frechet_real"]
    summary["dynamic_at_most_control"] = summary["frechet_dynamic"] <= summary["frechet_control"]
    whole = {
        **{name: runs[0][name] for name in ("model", "samples", "steps", "guidance")},
        "draws": len(runs[0]["per_seed"]["dynamic"]),
        "train_steps": train_steps,
        "mean": summary,
        "seeds": runs,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(whole, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown(whole).encode())
    print(markdown(whole))


def markdown(whole: Mapping[str, Any]) -> str:
    """The table, every number in it: also where the dynamic model loses."""
    runs, summary = whole["seeds"], whole["mean"]
    columns = [f"seed {run['seed']}" for run in runs]
    rows: list[tuple[str, ...]] = []
    for name in VALUES:
        values = [run[name] for run in runs]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        rows.append((name, *(f"{value:.3f}" for value in values), f"{summary[name]:.3f}{spread}"))
    verdict = "at most" if summary["dynamic_at_most_control"] else "above"
    return (
        f"{whole['model']}, {whole['draws']} draws of {whole['samples']} samples, {whole['steps']} steps, "
        f"guidance {whole['guidance']:g}; "
        f"Frechet distance to the training digits, on which held-out real digits score {summary['frechet_real']:.3f}.\n"
        f"The static model was trained for {whole['train_steps']} steps; the control is that model trained further, "
        "as long as the dynamic one is fine-tuned and on the same batches.\n\n"
        + as_markdown(("", *columns, "mean"), rows)
        + f"\nThe dynamic model's mean is {verdict} the control's.\n"
    )


if __name__ == "__main__":
    main()
