"""``dyexport eval``: the quality of a bundle that samples digits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dyexport.arguments import whole_number
from dyexport.commands import options
from dyexport.commands.bundles import open_bundle
from dyexport.commands.parsing import ExplicitOptions
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar

EXAMPLES = (
    "dyexport eval sit-digits-0.5",
    "dyexport eval sit-digits-0.5 --samples 450 --steps 25 --seeds 3",
    "dyexport eval sit-digits-0.5 --control --work sit-digits-0.5.work",
)

SEED_COUNT = 1000  # at most


def eval(
    context: typer.Context,
    bundle: options.BundleArgument,
    samples: Annotated[
        int, typer.Option(help="Samples of each model, equally many of every class.", metavar="N")
    ] = 1800,
    seeds: Annotated[int, typer.Option(help="Number of seeds; each repeats the samples.", metavar="N")] = 1,
    steps: options.StepsOption = None,
    guidance: Annotated[
        float, typer.Option(help="Guidance scale; 1 scores the model without guidance.", metavar="SCALE")
    ] = 1.0,
    scheduler: options.SchedulerOption = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Also score the dense model trained for as many more steps; trains it if that is not done.",
            metavar="",
        ),
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(help="With --control: work directory of the build. Default: where it was built.", metavar="DIR"),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score sampled digits by Frechet distance and class accuracy: the dense model, the dynamic one, the control."""
    from dyexport.bench.settings import SamplingConfig, check_digits
    from dyexport.bundle.reader import Bundle

    ExplicitOptions(context).refuse(not control, "it is for the training of --control", "work")
    whole_number("--seeds", seeds, least=1, most=SEED_COUNT)
    config = SamplingConfig(samples=samples, steps=steps, guidance=guidance, scheduler=scheduler)
    check_digits(open_bundle(bundle).manifest.model)
    opened = Bundle.open(bundle)
    path = _control(bundle, work) if control else None
    with chatter_on_stderr(), progress_bar("sampling") as advance:
        from dyexport.bench.evaluation import evaluate
        from dyexport.bench.quality import Evaluator
        from dyexport.bench.report import eval_table
        from dyexport.digits import load_digits

        evaluator = Evaluator(load_digits("train"))
        report = evaluate(opened, path, evaluator, load_digits("held-out"), config, range(seeds), advance)
    emit(asdict(report), as_json=json, human=lambda console: console.print(eval_table(report)))


def _control(bundle: Path, work: Path | None) -> Path:
    """Return the control of the build that made the bundle, with the settings that its work directory records."""
    from dyexport.commands.stages import building
    from dyexport.pipeline.settings import BuildSettings
    from dyexport.verification.verify import find_reference

    work = find_reference(open_bundle(bundle), work).parent
    with building(BuildSettings.load(work), without=frozenset({"static", "synthetic", "dynamic"})) as run:
        from dyexport.pipeline.build import finetune_model, train_control

        finetune_model(run)  # raises unless the model of these settings is there
        return train_control(run).path
