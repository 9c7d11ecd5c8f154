"""``dyexport eval``: the quality of what a bundle samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dyexport.arguments import whole_number
from dyexport.commands import options
from dyexport.commands.bundles import at_budget, open_bundle
from dyexport.commands.parsing import ExplicitOptions
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar

if TYPE_CHECKING:
    from dyexport.evaluation.report import EvalReport

EXAMPLES = (
    "dyexport eval sit-digits-0.5",
    "dyexport eval dit-xl-2-0.5 --vae stabilityai/sd-vae-ft-ema --real photos --features facebook/dinov2-base",
    "dyexport eval flux-0.5 --pipeline black-forest-labs/FLUX.1-dev --clip openai/clip-vit-large-patch14",
)

DISTANCES, PROMPTS, CONTROL = "Distances to real data", "Text-to-image and text-to-video models", "Control"
LABELS, OUTPUT = "Class-conditional models", "Output"
NO_WORK = "give --work DIR, the work directory of its build"


def eval(
    context: typer.Context,
    bundle: options.BundleArgument,
    budget: options.BundleBudgetOption = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Samples of each model, with equally many of every class. Default: 1800 in pixel space, 64 of other "
            "class-conditional models, 8 from prompts.",
            metavar="N",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds; each repeats the samples.", metavar="N")] = 1,
    steps: options.StepsOption = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale. Default: 1, which is none, for class labels; the model's for prompts.",
            metavar="SCALE",
        ),
    ] = None,
    target: options.TargetOption = "onnx",
    real: Annotated[
        str | None,
        typer.Option(
            help="Real data: a folder of pictures, searched recursively, or a .safetensors or .npz file of features, "
            "latents or pictures. Default: digits or emoji for models of those.",
            metavar="PATH",
            rich_help_panel=DISTANCES,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Feature extractor: digits, emoji, a transformers model such as DINOv2 or CLIP, or a TorchScript "
            "file, whose code is executed. Default: digits or emoji for models of those.",
            metavar="NAME|DIR|ID|FILE",
            rich_help_panel=DISTANCES,
        ),
    ] = None,
    subset: Annotated[
        int | None,
        typer.Option(
            help="Samples in a subset of the kernel distance. Default: 1000.",
            metavar="N",
            rich_help_panel=DISTANCES,
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="Classifier for class accuracy: digits, emoji, a transformers image classifier, or a TorchScript "
            "file, whose code is executed. Default: digits or emoji for models of those.",
            metavar="NAME|DIR|ID|FILE",
            rich_help_panel=LABELS,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="AutoencoderKL that decodes latents; without one, latents are scored.",
            metavar="DIR|ID",
            rich_help_panel=LABELS,
        ),
    ] = None,
    scheduler: options.LabelSchedulerOption = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Text encoders and VAE; without them, latents from random embeddings are scored.",
            metavar="DIR|ID",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one prompt a line. Default: 8 prompts that dyexport has.",
            metavar="FILE",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP model of transformers that compares pictures with their prompts.",
            metavar="DIR|ID",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size in pixels, such as 512 or 768x1024 (height x width). Default: the bundle's.",
            metavar="PIXELS",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Also score the dense model trained for as many more steps; trains it if that is not done.",
            metavar="",
            rich_help_panel=CONTROL,
        ),
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(
            help="With --control: work directory of the build. Default: where it was built.",
            metavar="DIR",
            rich_help_panel=CONTROL,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Also write the report: .json, .md or .csv by the suffix.",
            metavar="FILE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score what a bundle samples, next to its dense network: distances to real data, classes, prompts, and drift.

    Quality scores compare two models. Whether the engines compute what the fine-tuned model computes is another
    question: its answer, the golden check, is printed on a separate line, and the exit code is 1 if it fails.
    """
    bundle = at_budget(bundle, budget)
    from dyexport.bench.settings import check_output
    from dyexport.evaluation.settings import SEEDS, SUBSET, EvalSettings, SamplingConfig, parse_size, read_prompts

    ExplicitOptions(context).refuse(not control, "it is for the training of --control", "work")
    whole_number("--seeds", seeds, least=1, most=SEEDS)
    if out is not None:
        check_output(out)
    settings = EvalSettings(
        sampling=SamplingConfig(samples=samples, steps=steps, guidance=guidance, scheduler=scheduler),
        seeds=tuple(range(seeds)),
        target=target,
        features=features,
        real=real,
        subset=SUBSET if subset is None else subset,
        classifier=classifier,
        clip=clip,
        prompts=() if prompts is None else read_prompts(prompts),
        pipeline=pipeline,
        vae=vae,
        size=None if size is None else parse_size(size),
    )
    settings.check_for(open_bundle(bundle, target))
    if control:
        settings = replace(settings, control=_control(bundle, work))
    with chatter_on_stderr(), progress_bar("evaluating") as advance:
        from dyexport.bundle.reader import Bundle
        from dyexport.evaluating import evaluate_bundle

        report = evaluate_bundle(Bundle.open(bundle), settings, advance)
    if out is not None:
        from dyexport.evaluation.tables import save_report

        save_report(report, out)
    emit(report.as_json(), as_json=json, human=lambda console: _show(console, report))
    if report.golden is not None and not report.golden.passed:
        raise typer.Exit(1)


def _control(bundle: Path, work: Path | None) -> Path:
    """Return the control of the build that made the bundle, with the settings that its work directory records."""
    from dyexport.commands.stages import building
    from dyexport.pipeline.settings import BuildSettings
    from dyexport.verification.verify import find_reference

    work = find_reference(open_bundle(bundle), work, cure=NO_WORK).parent
    with building(BuildSettings.load(work), without=frozenset({"encoded", "static", "synthetic", "dynamic"})) as run:
        from dyexport.pipeline.build import finetune_model, train_control

        finetune_model(run)  # raises unless the model of these settings is there
        return train_control(run).path


def _show(console: Console, report: EvalReport) -> None:
    from dyexport.evaluation.tables import eval_view

    for warning in report.warnings:
        console.print(f"Warning: {warning}.", markup=False, soft_wrap=True)
    console.print(eval_view(report))
