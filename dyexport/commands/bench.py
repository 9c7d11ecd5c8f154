"""``dyexport bench``: a bundle timed against its dense graph and the dense torch module."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dyexport.arguments import parse_bytes
from dyexport.commands import options
from dyexport.commands.bundles import open_bundle
from dyexport.commands.given import Given
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar

EXAMPLES = (
    "dyexport bench sit-digits-0.5",
    "dyexport bench dit-xl-2-0.5 --batch 8 --steps 20 --no-compile",
    "dyexport bench flux-0.5 --target tensorrt-rtx --trajectory --json",
)


def bench(
    context: typer.Context,
    bundle: options.BundleArgument,
    batch: Annotated[
        int, typer.Option(help="Batch size of a call; guided sampling of one picture has 2.", metavar="N")
    ] = 2,
    steps: options.StepsOption = None,
    rounds: Annotated[
        int,
        typer.Option(help="Rounds of alternating blocks, each of 1 warm-up call and 4 timed ones.", metavar="N"),
    ] = 10,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of every variant. Default: torch's choice.", metavar="N")
    ] = None,
    target: options.TargetOption = "onnx",
    memory: options.MemoryOption = None,
    share_weights: Annotated[
        bool, typer.Option("--share-weights", help="Let all engines map one copy of the weights.", metavar="")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time torch.compile, which takes minutes.", metavar="")
    ] = True,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also time whole sampling loops.", metavar="")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time a bundle over the sampling trajectory, alternating with its dense graph and the dense torch module."""
    Given(context).refuse(target != "onnx", f"engines of {target} do not map the weight store", "share_weights")
    from dyexport.bench.settings import BenchSettings
    from dyexport.bundle.reader import Bundle

    settings = BenchSettings(
        target=target,
        memory=None if memory is None else parse_bytes(memory),
        batch=batch,
        steps=steps,
        rounds=rounds,
        threads=threads,
        share_weights=share_weights,
        compiled=compile,
        trajectory=trajectory,
    )
    settings.check_for(open_bundle(bundle, target))
    with chatter_on_stderr(), progress_bar("timing") as advance:
        from dyexport.bench.compare import compare
        from dyexport.bench.report import bench_tables

        report = compare(Bundle.open(bundle), settings, advance)
    emit(asdict(report), as_json=json, human=lambda console: console.print(*bench_tables(report), sep="\n\n"))
