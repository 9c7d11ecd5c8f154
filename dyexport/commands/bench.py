"""``dyexport bench``: a bundle timed against its dense graph and the dense torch module."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dyexport.arguments import parse_bytes
from dyexport.commands.given import Given
from dyexport.commands.options import BuildOptions, MemoryOption, StepsOption, TargetOption
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar
from dyexport.errors import UsageError


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
    from dyexport.commands.stages import building

    options = BuildOptions(
        model=model, budget=budget, random_weights=random_weights, engines=engines, token_path=token_path, out=out
    )
    settings = options.settings()
    with building(settings) as pipeline:
        pipeline.bundle()
    return settings.out
