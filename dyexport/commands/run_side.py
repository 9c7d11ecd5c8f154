"""Commands that run a bundle: bench, eval, inspect, demo. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dyexport.arguments import parse_bytes, whole_number
from dyexport.commands.given import Given, OnceEach
from dyexport.commands.options import BuildOptions
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar
from dyexport.errors import UsageError

app = typer.Typer()

SEED_COUNT = 1000  # of eval

BundleArgument = Annotated[Path, typer.Argument(help="A bundle directory.")]
StepsOption = Annotated[int, typer.Option(help="Denoising steps.")]
SchedulerOption = Annotated[
    str | None, typer.Option(help="ddim or dpm++ for DiT, euler for SiT; by default the first that fits.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="What weights may take while running, such as 8GiB; fewer engines stay in memory then."),
]
TargetOption = Annotated[str, typer.Option(help="Which of the bundle's engine formats to run.")]


@app.command(cls=OnceEach)
def bench(
    context: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="A bundle directory; or give --model to build one.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A preset to build and time.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", "-b", help="FLOPs ratio to build for, such as 0.5.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --model: random weights, which take the same time.")
    ] = False,
    engines: Annotated[
        int | None, typer.Option("--engines", "-k", help="With --model: how many engines to build.")
    ] = None,
    token_path: Annotated[str, typer.Option(help="With --model: how skipped tokens are left out.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --model: the bundle; by default ./MODEL-BUDGET.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples in a call; 2 is one picture under guidance.")] = 2,
    steps: StepsOption = 50,
    rounds: Annotated[int, typer.Option(help="Rounds of alternating blocks, each 1 warm-up and 4 timed calls.")] = 10,
    threads: Annotated[int | None, typer.Option(help="Threads of every variant; by default torch's choice.")] = None,
    target: TargetOption = "onnx",
    memory: MemoryOption = None,
    share_weights: Annotated[
        bool, typer.Option("--share-weights", help="Engines map one copy of the weights.")
    ] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Leave torch.compile out, which takes minutes.")
    ] = False,
    trajectory: Annotated[bool, typer.Option("--trajectory", help="Time whole sampling loops as well.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time a bundle over the trajectory against its dense graph and the dense torch module, all in one run."""
    if (bundle is None) == (model is None):
        raise UsageError("bench takes a bundle, or --model with --budget to build one; give one of the two")
    given = Given(context)
    built = ("budget", "random_weights", "engines", "token_path", "out")
    given.refuse(model is None, "the bundle is built already", *built)
    given.refuse(target != "onnx", f"engines of {target} do not map the weight store", "share_weights")
    if model is not None:
        bundle = _built(model, budget, random_weights, engines, token_path, out)
    with chatter_on_stderr(), progress_bar("timing") as advance:
        from dyexport.bench.compare import BenchSettings, compare
        from dyexport.bench.report import bench_tables
        from dyexport.bundle.reader import Bundle

        settings = BenchSettings(
            target=target,
            memory=None if memory is None else parse_bytes(memory),
            batch=batch,
            steps=steps,
            rounds=rounds,
            threads=threads,
            share_weights=share_weights,
            compiled=not no_compile,
            trajectory=trajectory,
        )
        report = compare(Bundle.open(str(bundle)), settings, advance)
    emit(asdict(report), as_json=json, human=lambda console: console.print(*bench_tables(report), sep="\n\n"))


def _built(
    model: str, budget: str | None, random_weights: bool, engines: int | None, token_path: str, out: Path | None
) -> Path:
    from dyexport.commands.building import building

    options = BuildOptions(
        model=model, budget=budget, random_weights=random_weights, engines=engines, token_path=token_path, out=out
    )
    settings = options.settings()
    with building(settings) as pipeline:
        pipeline.bundle()
    return settings.out


@app.command(name="eval", cls=OnceEach)
def evaluate(
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
        from dyexport.demo import real_digits

        judge = Evaluator(real_digits("train"))
        report = score(opened, path, judge, real_digits("held-out"), drawing, range(seeds), advance)
    emit(asdict(report), as_json=json, human=lambda console: console.print(eval_table(report)))


def _control(
    bundle: Path, train_steps: int | None, finetune_steps: int | None, checkpoint: str | None, seed: int
) -> Path:
    """The control of the build that made the bundle; its ledger refuses other settings than that build's."""
    from dyexport.bundle.reader import Bundle
    from dyexport.commands.building import building
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


@app.command(cls=OnceEach)
def inspect(
    context: typer.Context,
    bundle: BundleArgument,
    png: Annotated[Path | None, typer.Option(help="Also write the heat map as a picture.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Show one network's TensorRT plan instead: segment-00, conditioning, dense.")
    ] = None,
    target: Annotated[str, typer.Option(help="With --engine: whose plan.")] = "tensorrt-rtx",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what is in a bundle: its segments, and a heat map of widths over t and depth."""
    Given(context).refuse(engine is None, "it is for --engine", "target")
    Given(context).refuse(engine is not None, "--engine shows a plan, which has no heat map", "png")
    if engine is not None:
        _inspect_plan(bundle, target, engine, json)
        return
    with chatter_on_stderr():
        from dyexport.bench.heatmap import draw_image, draw_text
        from dyexport.bench.pictures import save_png
        from dyexport.bench.report import inspect_payload, inspect_table
        from dyexport.bundle.reader import Bundle

        opened = Bundle.open(bundle)
        if png is not None:
            save_png(draw_image(opened), png)

    def show(console: Console) -> None:
        heat_map = draw_text(opened, ascii_only=console.options.ascii_only)
        console.print(inspect_table(opened), "", heat_map, sep="\n")

    emit(inspect_payload(opened), as_json=json, human=show)


def _inspect_plan(bundle: Path, target: str, network: str, as_json: bool) -> None:
    from dyexport.bench.tensorrt_plans import plan_lines, plan_of
    from dyexport.bundle.reader import Bundle

    info = plan_of(Bundle.open(bundle), target, network)
    emit(info.model_dump(mode="json"), as_json=as_json, human=lambda console: console.print(*plan_lines(info)))


@app.command(cls=OnceEach)
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where everything goes.")] = Path("out/demo"),
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The main job from nothing: train digits, make them dynamic, build, verify, time, score and draw."""
    from dyexport.commands.building import stage_lines

    with stage_lines() as lines:
        from dyexport.bench.report import as_table
        from dyexport.demo import demo_rows, demo_settings, run_demo

        report = run_demo(demo_settings(out), lines)
    table = as_table(f"bundle: {report.bundle}   pictures: {report.pictures}", ("measured", "value"), demo_rows(report))
    emit(asdict(report), as_json=json, human=lambda console: console.print(table))
