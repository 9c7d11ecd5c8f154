"""``dyexport bench``: a bundle timed against its dense network and the diffusers module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dyexport.arguments import parse_bytes
from dyexport.commands import options
from dyexport.commands.bundles import at_budget, open_bundle
from dyexport.commands.parsing import ExplicitOptions
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar, stderr

if TYPE_CHECKING:
    from dyexport.bench.rows import BenchReport
    from dyexport.bench.settings import BenchSettings
    from dyexport.bundle.reader import Bundle

EXAMPLES = (
    "dyexport bench dit-xl-2-0.5 --batch 1,2,8 --steps 20 --no-compile",
    "dyexport bench dit-xl-2-0.5 --target onnx --target torch -o report.md",
    "dyexport bench flux-0.5 --target tensorrt-rtx --device cuda --size 512,1024 --trajectory --json",
)

CASES, VARIANTS, OUTPUT = "Cases", "Variants", "Output"


def bench(
    context: typer.Context,
    bundle: options.BundleArgument,
    budget: options.BundleBudgetOption = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Engine format to run; repeat it to time several in one run. Default: onnx.",
            metavar="NAME",
            autocompletion=options.target_names,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N. Default: CUDA where torch and the engines have it.", metavar="NAME"),
    ] = None,
    steps: options.StepsOption = None,
    rounds: Annotated[
        int,
        typer.Option(help="Rounds of alternating blocks, each of 1 warm-up call and 4 timed ones.", metavar="N"),
    ] = 10,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of every variant. Default: torch's choice.", metavar="N")
    ] = None,
    memory: options.MemoryOption = None,
    share_weights: Annotated[
        bool,
        typer.Option(
            "--share-weights",
            help="Let all engines map one copy of the weights: less memory, a few percent slower.",
            metavar="",
        ),
    ] = False,
    batch: Annotated[
        str,
        typer.Option(
            help="Batch sizes of a call, such as 1,2,8; guided sampling of one picture has 2.",
            metavar="N,...",
            rich_help_panel=CASES,
        ),
    ] = "2",
    size: Annotated[
        str | None,
        typer.Option(
            help="Sizes in pixels, such as 512,768x1024 (height x width). Default: the bundle's.",
            metavar="PIXELS,...",
            rich_help_panel=CASES,
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Also time torch.compile, which takes minutes.",
            metavar="",
            rich_help_panel=VARIANTS,
        ),
    ] = True,
    eager: Annotated[
        bool,
        typer.Option(
            "--eager/--no-eager", help="Also time the diffusers module.", metavar="", rich_help_panel=VARIANTS
        ),
    ] = True,
    trajectory: Annotated[
        bool,
        typer.Option("--trajectory", help="Also time whole sampling loops.", metavar="", rich_help_panel=VARIANTS),
    ] = False,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Also time whole pictures from a prompt, with the text encoders and the VAE of this pipeline.",
            metavar="DIR|ID",
            rich_help_panel=VARIANTS,
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
    """Time a bundle over the sampling trajectory, alternating with its dense network and the diffusers module."""
    bundle = at_budget(bundle, budget)
    from dyexport.bench.settings import BenchSettings, check_output, parse_batches, parse_sizes
    from dyexport.bundle.reader import Bundle

    targets = tuple(target or ("onnx",))
    explicit = ExplicitOptions(context)
    explicit.refuse(
        "onnx" not in targets, f"engines of {', '.join(targets)} hold weights in one way only", "share_weights"
    )
    settings = BenchSettings(
        targets=targets,
        device=device,
        batches=parse_batches(batch),
        sizes=() if size is None else parse_sizes(size),
        memory=None if memory is None else parse_bytes(memory),
        steps=steps,
        rounds=rounds,
        threads=threads,
        share_weights=share_weights,
        compiled=compile,
        eager=eager,
        trajectory=trajectory,
        pipeline=pipeline,
    )
    if out is not None:
        check_output(out)
    for each in targets:
        _refuse_useless(explicit, settings, open_bundle(bundle, each))
    with chatter_on_stderr():
        with _phase("opening the bundle"):
            from dyexport.bench.compare import compare
            from dyexport.bench.rows import payload
            from dyexport.bench.tables import save_report

            opened = Bundle.open(bundle)
        report = compare(opened, settings, _phase)
        if out is not None:
            save_report(report, out)
    emit(payload(report), as_json=json, human=lambda console: _show(console, report))


@contextmanager
def _phase(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a phase on stderr; without a terminal its name at once, then a line now and then."""
    if not (console := stderr()).is_terminal:
        console.print(f"{name} ...", markup=False, soft_wrap=True)
    with progress_bar(name) as advance:
        yield advance


def _refuse_useless(explicit: ExplicitOptions, settings: BenchSettings, bundle: Bundle) -> None:
    """Raise ``UsageError`` for an option that is for another kind of model."""
    from dyexport.samples import useless_arguments

    for name, because in useless_arguments(bundle.manifest.model).items():
        if name == "pipeline":
            explicit.refuse(True, because, name)
    settings.check_for(bundle)


def _show(console: Console, report: BenchReport) -> None:
    from dyexport.bench.tables import bench_tables

    for warning in report.warnings:
        console.print(f"Warning: {warning}.", markup=False, soft_wrap=True)
    console.print(*bench_tables(report), sep="\n\n")
