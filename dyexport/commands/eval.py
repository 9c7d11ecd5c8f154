"""``dyexport eval``: the quality of a bundle that samples digits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dyexport.arguments import whole_number
from dyexport.commands.given import Given
from dyexport.commands.options import BuildOptions, BundleArgument, SchedulerOption, StepsOption
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar

SEED_COUNT = 1000


def eval(
    context: typer.Context,
    bundle: BundleArgument,
    samples: Annotated[int, typer.Option(help="Pictures to draw of each model, every class equally often.")] = 1800,
    seeds: Annotated[int, typer.Option(help="Repetitions with other noise.")] = 1,
    steps: StepsOption = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 scores the bare model.")] = 1.0,
    scheduler: SchedulerOption = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control", help="Also score the static model trained as long, training it where that is not done."
        ),
    ] = False,
    train_steps: Annotated[int | None, typer.Option(help="With --control: as given to build.")] = None,
    finetune_steps: Annotated[int | None, typer.Option(help="With --control: as given to build.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="With --control: as given to build.")] = None,
    seed: Annotated[int, typer.Option(help="With --control: as given to build.")] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score digits by Frechet distance and class accuracy: the dense model, the dynamic one and the control."""
    from dyexport.bench.evaluation import SamplingConfig, check_digits
    from dyexport.bundle.reader import Bundle

    build = ("train_steps", "finetune_steps", "checkpoint", "seed")
    Given(context).refuse(not control, "it is for the training of --control", *build)
    whole_number("--seeds", seeds, least=1, most=SEED_COUNT)
    drawing = SamplingConfig(samples=samples, steps=steps, guidance=guidance, scheduler=scheduler)
    opened = Bundle.open(bundle)
    check_digits(opened.manifest.model)
    path = _control(bundle, train_steps, finetune_steps, checkpoint, seed) if control else None
    with chatter_on_stderr(), progress_bar("drawing") as advance:
        from dyexport.bench.evaluation import evaluate as score
        from dyexport.bench.quality import Evaluator
        from dyexport.bench.report import eval_table
        from dyexport.digits import load_digits

        judge = Evaluator(load_digits("train"))
        report = score(opened, path, judge, load_digits("held-out"), drawing, range(seeds), advance)
    emit(asdict(report), as_json=json, human=lambda console: console.print(eval_table(report)))


def _control(
    bundle: Path, train_steps: int | None, finetune_steps: int | None, checkpoint: str | None, seed: int
) -> Path:
    """The control of the build that made the bundle; its ledger refuses other settings than that build's."""
    from dyexport.bundle.reader import Bundle
    from dyexport.commands.stages import building
    from dyexport.verification.verify import find_reference

    found = Bundle.open(bundle, check_hashes=False)
    options = BuildOptions(
        model=found.manifest.model.name,
        budget=None if found.manifest.budget is None else str(found.manifest.budget),
        train_steps=train_steps,
        finetune_steps=finetune_steps,
        checkpoint=checkpoint,
        seed=seed,
        out=bundle,
        work=find_reference(found).parent,
    )
    with building(options.settings(), without=frozenset({"static", "synthetic", "dynamic"})) as pipeline:
        assert pipeline.dynamic.reused
        return pipeline.control.path
