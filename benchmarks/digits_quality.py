"""Does width that follows t cost quality? Digits or emoji at lambda 0.5 against the static model trained as long.

One static model is trained from scratch; from it, for each seed, the *control* is trained on, a dynamic model is
fine-tuned on the same batches (``full``), and so are models with TD-LoRA if ``--models`` lists them. All are
evaluated in the same way: by the Frechet distance to the training pictures, over several evaluations from the same
noise for every model (with thousands of pictures the noise alone moves a model's score by as much as a seed does),
and by the loss on training and on held-out pictures, the same noise and timesteps for every model: far less noisy.

    python -m benchmarks.digits_quality --train-steps 10000 --models static control full rank=1,experts=4

Takes two to five hours on 2 cores. Stop it at any time: the same command goes on where it stopped. With the static
model there, runs of some of the models and seeds, side by side in several terminals, share the work; the whole command
then reads it all back. Writes benchmarks/results/sit-digits_quality_10000.json and .md; with ``--finetune-steps``
their number is in the name too.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.quality import (
    BUNDLE,
    CONTROL,
    STATIC,
    Family,
    Kind,
    Protocol,
    Scorer,
    Store,
    Trained,
    default_train_steps,
    reported,
    train,
    write_results,
)
from dyexport.bench.report import as_markdown
from dyexport.bundle.spec import ModelSpec
from dyexport.console import StageLines, chatter_on_stderr
from dyexport.digits import Split
from dyexport.errors import UsageError
from dyexport.evaluation.data_sets import data_set_of
from dyexport.evaluation.settings import SamplingConfig
from dyexport.lora import parse_lora
from dyexport.progress import Progress
from dyexport.runtime.sampling import Denoiser, guided
from dyexport.training.data import BUILT_IN
from dyexport.training.losses import get_objective

RESULTS = Path(__file__).parent / "results"
FULL = "full"  # fine-tuning of all weights; names other than this, static and control are what --td-lora takes
LOSS_TIMESTEPS = 20
ROWS = 300  # pictures of one forward pass
GOAL = 1.1  # TD-LoRA's Frechet distance over full fine-tuning's


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/digits-quality"))
    parser.add_argument("--model", default="sit-digits")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--models", nargs="+", default=[STATIC, CONTROL, FULL], help="or what --td-lora takes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tuning runs")
    parser.add_argument("--train-steps", type=int, help="of the static model; default: its recipe's")
    parser.add_argument("--finetune-steps", type=int)
    parser.add_argument("--engines", type=int, default=4, help="of a dynamic model when it is sampled")
    parser.add_argument("--samples", type=int, default=5400, help="pictures per evaluation")
    parser.add_argument("--repeats", type=int, default=3, help="evaluations of every model, each from different noise")
    parser.add_argument("--steps", type=int, default=50, help="of sampling")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    train_steps = options.train_steps or default_train_steps(options.model)
    sampling = SamplingConfig(samples=options.samples, steps=options.steps, guidance=1.0)
    protocol = Protocol(sampling=sampling, repeats=options.repeats)
    family = Family(
        model=options.model,
        work=options.work,
        budget=options.budget,
        train_steps=train_steps,
        finetune_steps=options.finetune_steps,
        engines=options.engines,
    )
    with chatter_on_stderr(), StageLines() as lines:
        static, scorer = train(family.static, STATIC, lines).path, Scorer(family.spec)
        runs = [
            score_run(family, static, name, seed, scorer, protocol, lines)
            for name in options.models
            for seed in (options.seeds[:1] if name == STATIC else options.seeds)
        ]
    whole = {
        "model": options.model,
        "data": data_of(family.spec),
        "budget": options.budget,
        "train_steps": train_steps,
        "finetune_steps": family.static.finetune_schedule.steps,
        **asdict(protocol),
        "frechet_real": scorer.frechet_real,
        "mean": {name: mean_of(runs, name) for name in options.models},
        "runs": runs,
    }
    steps = [train_steps, *([options.finetune_steps] if options.finetune_steps else [])]
    file = options.results / f"{options.model}_quality_{'_'.join(map(str, steps))}.json"
    write_results(file, whole, markdown(whole))
    print(markdown(whole))


def score_run(
    family: Family, static: Path, name: str, seed: int, scorer: Scorer, protocol: Protocol, lines: StageLines
) -> dict[str, Any]:
    """Train and evaluate one model; earlier evaluations are read back."""
    kind: Kind = name if name in (STATIC, CONTROL) else BUNDLE
    lora = None if name in (STATIC, CONTROL, FULL) else parse_lora(name)
    folder = name.replace(",", "-").replace("=", "")
    settings = family.static if name == STATIC else family.tuned(folder, static, seed, td_lora=lora)
    trained = train(settings, kind, lines)

    def score() -> dict[str, Any]:
        with reported(lines, f"eval of {name}, seed {seed}") as advance:
            found = scores_of(trained.open(family.spec), family.spec, scorer, protocol, advance)
        return {**facts_of(trained), **found}

    kept = Store(family.work / "scores").read(protocol.key(trained.digest, LOSS_TIMESTEPS), score)
    return {"run": name, "seed": seed, **kept}


def facts_of(trained: Trained) -> dict[str, float]:
    """Return what is known of a bundle without a picture."""
    if (manifest := trained.manifest) is None:
        return {}
    facts = {part: manifest.metrics[part] for part in ("trainable_parameters", "trainable_share")}
    return facts | {
        "flops_ratio": manifest.plan.flops_ratio,
        "network_flops_ratio": manifest.plan.network_flops_ratio,
    }


def scores_of(
    network: Denoiser, spec: ModelSpec, scorer: Scorer, protocol: Protocol, progress: Progress
) -> dict[str, Any]:
    scores, _ = scorer(network, protocol, progress)
    return {
        "frechet": scores.frechet,
        "class_accuracy": scores.class_accuracy,
        "loss_train": loss_of(network, spec, "train"),
        "loss_held_out": loss_of(network, spec, "held-out"),
        "repeats": [
            {"seed": each.seed, "frechet": each.frechet, "class_accuracy": each.class_accuracy} for each in scores.seeds
        ],
    }


def data_of(spec: ModelSpec) -> str:
    """Return the built-in data set that a model is trained on. Raises ``UsageError`` for one without."""
    if (data := data_set_of(spec)) is None:
        raise UsageError(f"{spec.name} has no built-in data set; name a model of digits or emoji")
    return data


@torch.no_grad()
def loss_of(transformer: Denoiser, spec: ModelSpec, split: Split) -> float:
    """Compute the mean diffusion loss over all pictures at evenly spaced timesteps, without a learned variance."""
    objective, source = get_objective(spec.objective), BUILT_IN[data_of(spec)](split)
    losses = []
    for index in range(LOSS_TIMESTEPS):
        noise = torch.randn(source.latents.shape, generator=torch.Generator().manual_seed(index))  # (n, C, H, W)
        uniform = torch.full((len(source),), (index + 0.5) / LOSS_TIMESTEPS)  # (n,)
        noised = objective.noisy(source.latents, noise, uniform)
        t = float(noised.timestep[0])
        parts = zip(noised.latents.split(ROWS), source.labels.split(ROWS), strict=True)
        sample = torch.cat([guided(transformer, spec, latents, t, labels, 1.0) for latents, labels in parts])
        losses.append(float(objective.loss(sample, noised).mean()))
    return fmean(losses)


def mean_of(runs: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    mine = [run for run in runs if run["run"] == name]
    return {value: fmean(run[value] for run in mine) for value, kind in mine[0].items() if isinstance(kind, float)}


def markdown(whole: Mapping[str, Any]) -> str:
    """Return the table, with every number: also where the dynamic model or TD-LoRA loses."""
    data, means, rows = whole["data"], whole["mean"], []
    for name, mean in means.items():
        mine = [run for run in whole["runs"] if run["run"] == name]
        each = [run["frechet"] for run in mine]
        spread = f" ± {stdev(each):.4f} ({', '.join(f'{value:.4f}' for value in each)})" if len(each) > 1 else ""
        ratios = [
            f"{mean['frechet'] / means[base]['frechet']:.2f}" if base in means else "" for base in (CONTROL, FULL)
        ]
        counts = (
            "{trainable_parameters:.0f} ({trainable_share:.2%})".format(**mean) if "trainable_share" in mean else ""
        )
        rows.append(
            (
                name,
                counts,
                f"{mean['flops_ratio']:.3f}" if "flops_ratio" in mean else "1",
                f"{mean['frechet']:.4f}{spread}",
                *ratios,
                f"{mean['loss_train']:.4f}",
                f"{mean['loss_held_out']:.4f}",
                f"{100 * mean['class_accuracy']:.1f} %",
            )
        )
    return (
        f"{whole['model']}, {whole['repeats']} x {whole['sampling']['samples']} samples, "
        f"{whole['sampling']['steps']} steps, no guidance; Frechet distance to the training {data}, on which "
        f"held-out real {data} score {whole['frechet_real']:.3f}.\n"
        f"The static model was trained for {whole['train_steps']} steps, all others for {whole['finetune_steps']} more "
        f"on the same batches. Goals: full at most control; TD-LoRA at most {GOAL} of full with less than 5 % "
        "trainable.\n\n"
        + as_markdown(
            (
                "model",
                "trainable",
                "lambda",
                "Frechet: mean, deviation, each seed",
                "over control",
                "over full",
                f"loss, training {data}",
                "loss, held-out",
                "class accuracy",
            ),
            rows,
        )
    )


if __name__ == "__main__":
    main()
