"""Does width that follows t cost quality? Digits or emoji at lambda 0.5 against the static model trained as long.

One static model is trained from scratch; from it, for each seed, the *control* is trained on, a dynamic model is
fine-tuned on the same batches (``full``), and so are models with TD-LoRA if ``--models`` lists them. All are
evaluated in the same way: by the Frechet distance to the training pictures, over several evaluations from the same
noise for every model (with thousands of pictures the noise alone moves a model's score by as much as a seed does),
and by the loss on training and on held-out pictures, the same noise and timesteps for every model: far less noisy.

    python benchmarks/digits_quality.py --train-steps 10000 --models static control full rank=1,experts=4

Takes two to five hours on 2 cores. Stop it at any time: the same command goes on where it stopped. With the static
model there, runs of some of the models and seeds, side by side in several terminals, share the work; the whole command
then reads it all back. Writes benchmarks/results/sit-digits_quality_10000.json and .md; with ``--finetune-steps``
their number is in the name too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from dyexport.backbones.base import Preset
from dyexport.bench.report import as_markdown
from dyexport.console import StageLines, chatter_on_stderr
from dyexport.evaluation.evaluate import score_model
from dyexport.evaluation.judges import Judges, built_in_judges, real_distance
from dyexport.evaluation.report import ModelScores
from dyexport.evaluation.samplers import LabelSampler
from dyexport.evaluation.settings import EvalSettings, SamplingConfig
from dyexport.files import write_atomically
from dyexport.lora import parse_lora
from dyexport.pipeline.build import build_bundle, make_static_model, opened, train_control
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import get_preset
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import Denoiser, guided
from dyexport.slicing.slicer import spec_of
from dyexport.stages.file_records import digest_of
from dyexport.training.data import BUILT_IN, Split
from dyexport.training.losses import get_objective

RESULTS = Path(__file__).parent / "results"
STATIC, CONTROL, FULL = "static", "control", "full"  # anything else is what --td-lora takes
LOSS_TIMESTEPS = 20
ROWS = 300  # pictures of one forward pass
GOAL = 1.1  # TD-LoRA's Frechet distance over full fine-tuning's


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Evaluation of every model: ``repeats`` times from different noise. The field names are keys of the results."""

    sampling: SamplingConfig
    repeats: int

    def key(self, model: Any) -> str:
        """Return a key of a model's score."""
        return digest_of([model, asdict(self.sampling), self.repeats, LOSS_TIMESTEPS])


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
    data, schedule = data_of(get_preset(options.model)), get_preset(options.model).recipe.from_scratch
    if options.train_steps is None and schedule is not None:
        options.train_steps = schedule.steps
    sampling = SamplingConfig(samples=options.samples, steps=options.steps, guidance=1.0)
    protocol = Protocol(sampling=sampling, repeats=options.repeats)
    static = BuildSettings(
        model=options.model,
        budget=options.budget,
        out=options.work / STATIC,
        work=options.work / f"{STATIC}.work",
        train_steps=options.train_steps,
        finetune_steps=options.finetune_steps,
        engines=options.engines,
        baseline=False,
    )
    with opened(static, StageLines()) as run:
        path = make_static_model(run).static.path
    runs = [
        score_run(static if name == STATIC else tuned_from(path, static, name, seed), name, protocol)
        for name in options.models
        for seed in (options.seeds[:1] if name == STATIC else options.seeds)
    ]
    whole = {
        "model": options.model,
        "budget": options.budget,
        "train_steps": options.train_steps,
        "finetune_steps": static.finetune_schedule.steps,
        **asdict(protocol),
        "frechet_real": real_distance(EvalSettings(real=data), judges(data)),
        "mean": {name: mean_of(runs, name) for name in options.models},
        "runs": runs,
    }
    steps = [options.train_steps, *([options.finetune_steps] if options.finetune_steps else [])]
    file = options.results / f"{options.model}_quality_{'_'.join(map(str, steps))}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(whole, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown(whole).encode())
    print(markdown(whole))


def tuned_from(checkpoint: Path, static: BuildSettings, name: str, seed: int) -> BuildSettings:
    out = static.out.with_name(f"{name.replace(',', '-').replace('=', '')}-seed{seed}")
    return replace(
        static,
        out=out,
        work=out.with_name(f"{out.name}.work"),
        checkpoint=str(checkpoint),
        train_steps=None,
        td_lora=None if name in (CONTROL, FULL) else parse_lora(name),
        seed=seed,
    )


def score_run(settings: BuildSettings, name: str, protocol: Protocol) -> dict[str, Any]:
    """Train and evaluate one model; earlier evaluations are read back."""
    with chatter_on_stderr(), StageLines() as lines:
        with opened(settings, lines) as run:
            trained, transformer, facts = trained_model(run, name)
        key = protocol.key(trained)
        saved = settings.work / "score.json"
        if saved.exists() and (score := json.loads(saved.read_text()))["key"] == key:
            return dict(score)
        lines.started("eval", f"{name}, seed {settings.seed}")
        found = judged(transformer(), settings.preset, protocol, lambda done, all_: lines.advanced("eval", done, all_))
        score = {"key": key, "run": name, "seed": settings.seed, **facts, **found}
        write_atomically(saved, json.dumps(score, indent=1).encode())
    return score


def trained_model(run: Run, name: str) -> tuple[Any, Callable[[], Any], dict[str, float]]:
    """What identifies it, what loads it, and what is known of it without a picture."""
    if name in (STATIC, CONTROL):
        outcome = make_static_model(run).static if name == STATIC else train_control(run)
        return outcome.digest, lambda: DiTTransformer2DModel.from_pretrained(outcome.path).eval(), {}
    manifest = build_bundle(run)
    facts = {part: manifest.metrics[part] for part in ("trainable_parameters", "trainable_share")}
    facts |= {"flops_ratio": manifest.plan.flops_ratio, "network_flops_ratio": manifest.plan.network_flops_ratio}
    out = run.settings.out
    return manifest.model_dump(mode="json"), lambda: load(out, check_hashes=False), facts


def judged(
    transformer: Denoiser, preset: Preset, protocol: Protocol, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    spec = spec_of(preset, preset.transformer_config())
    sampler = LabelSampler(spec, EvalSettings(sampling=protocol.sampling))
    judging = judges(data_of(preset))
    scores = ModelScores.of("", score_model(transformer, sampler, judging, range(protocol.repeats), progress))
    return {
        "frechet": scores.frechet,
        "class_accuracy": scores.class_accuracy,
        "loss_train": loss_of(transformer, preset, "train"),
        "loss_held_out": loss_of(transformer, preset, "held-out"),
        "repeats": [
            {"seed": each.seed, "frechet": each.frechet, "class_accuracy": each.class_accuracy} for each in scores.seeds
        ],
    }


def data_of(preset: Preset) -> str:
    """The built-in data set that a model is trained on."""
    assert preset.recipe.data in BUILT_IN, f"{preset.name} has no data set of its own"
    return preset.recipe.data


@cache
def judges(data: str) -> Judges:
    return built_in_judges(data)


@torch.no_grad()
def loss_of(transformer: Denoiser, preset: Preset, split: Split) -> float:
    """Mean of the diffusion loss over all pictures at evenly spaced timesteps; a learned variance does not count."""
    objective, source = get_objective(preset.objective), BUILT_IN[data_of(preset)](split)
    spec = spec_of(preset, preset.transformer_config())
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
    """The table, every number in it: also where the dynamic model or TD-LoRA loses."""
    data = data_of(get_preset(whole["model"]))
    means, rows = whole["mean"], []
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
