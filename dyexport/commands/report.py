"""``dyexport report``: a page about a bundle, to look at and to pass on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dyexport.commands import options
from dyexport.commands.bundles import at_budget, open_bundle
from dyexport.commands.parsing import ExplicitOptions
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, format_bytes, progress_bar

if TYPE_CHECKING:
    from dyexport.report.contents import Report
    from dyexport.verification.report import VerifyReport

EXAMPLES = (
    "dyexport report sit-digits-0.5",
    "dyexport report sit-digits-0.5 --bench bench.json --eval eval.json -o digits.html",
    "dyexport report flux-0.5 --pipeline black-forest-labs/FLUX.1-dev --samples 2 --steps 20",
)

PICTURES, MEASUREMENTS, OUTPUT = "Pictures", "Measurements", "Output"
OF_SAMPLING = ("samples", "seed", "prompt", "pipeline", "vae")
SKIPPED = "skipped by --no-verify"


def report(
    context: typer.Context,
    bundle: options.BundleArgument,
    budget: options.BundleBudgetOption = None,
    target: options.TargetOption = "onnx",
    pictures: Annotated[
        bool,
        typer.Option(
            "--with-samples/--no-samples",
            help="Sample pictures of both networks.",
            metavar="",
            rich_help_panel=PICTURES,
        ),
    ] = True,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Pictures of each network. Default: one of each class, up to 10; two without classes.",
            metavar="N",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="Seed of the first picture; later ones count up.", metavar="N", rich_help_panel=PICTURES),
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps, of pictures and of the timeline. Default: the model's.",
            metavar="N",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    scheduler: options.LabelSchedulerOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="With --pipeline: prompt; may be repeated.", metavar="TEXT", rich_help_panel=PICTURES),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Text encoders and VAE of a model that samples from prompts. Without: latents in false color.",
            metavar="DIR|ID",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="AutoencoderKL of a model that samples from classes. Without: latents in false color.",
            metavar="DIR|ID",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            help="Latency and memory, written by `dyexport bench BUNDLE -o FILE`, as JSON.",
            metavar="FILE",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help="Quality, written by `dyexport eval BUNDLE -o FILE`, as JSON.",
            metavar="FILE",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the bundle with its golden data.",
            metavar="",
            rich_help_panel=MEASUREMENTS,
        ),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Default: the bundle's name with .html added.", metavar="FILE", rich_help_panel=OUTPUT
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a page about a bundle: pictures, widths, engines, costs, and how far it is from the masked model.

    One HTML file with everything in it, for any browser. It shows latency, memory and quality from files of
    `dyexport bench` and `dyexport eval`, and measures none of them itself.
    """
    bundle = at_budget(bundle, budget)
    from dyexport.report.page import check_libraries
    from dyexport.report.settings import ReportSettings, check_output

    ExplicitOptions(context).refuse(not pictures, "nothing is sampled with --no-samples", *OF_SAMPLING)
    settings = ReportSettings(
        target=target,
        samples=samples,
        seed=seed,
        steps=steps,
        scheduler=scheduler,
        pictures=pictures,
        prompts=tuple(prompt or ()),
        pipeline=pipeline,
        vae=vae,
    )
    out = check_output(out, bundle)
    manifest = open_bundle(bundle, target).manifest
    settings.check_for(manifest.model)
    check_libraries()
    with chatter_on_stderr(), progress_bar("reading measurements"):
        from dyexport.bundle.reader import Bundle
        from dyexport.report.measurements import read_bench, read_eval

        measured = None if bench is None else read_bench(bench, manifest)
        scored = None if evaluation is None else read_eval(evaluation, manifest)
    with chatter_on_stderr():
        from dyexport.files import write_atomically
        from dyexport.report.collect import Given, collect
        from dyexport.report.page import render

        given = Given(verified=_verified(bundle, target) if verify else SKIPPED, bench=measured, evaluation=scored)
        command = shlex.join(["dyexport", *sys.argv[1:]])
        with progress_bar("sampling" if pictures else "drawing") as advance:
            contents = collect(Bundle.open(bundle, check_hashes=not verify), settings, given, command, advance)
            page = render(contents).encode()
        write_atomically(out, page)
    payload = _payload(out, page, contents, given.verified)
    shown = f"{out} ({format_bytes(len(page))})"
    emit(payload, as_json=json, human=lambda console: console.print(shown, markup=False, soft_wrap=True))


def _verified(bundle: Path, target: str) -> VerifyReport | str:
    """Compare a bundle with its golden data; return the reason if it has none."""
    from dyexport.bundle.golden import GOLDEN
    from dyexport.verification.settings import VerifySettings
    from dyexport.verification.verify import verify_bundle

    manifest = open_bundle(bundle).manifest
    if manifest.place(GOLDEN) not in manifest.files:
        return "an older dyexport built this bundle, without golden data"
    with progress_bar("verifying") as advance:
        return verify_bundle(bundle, VerifySettings(target=target), golden_only=True, progress=advance)


def _payload(out: Path, page: bytes, report: Report, verified: VerifyReport | str) -> dict[str, Any]:
    """Return what ``--json`` prints: the file, the figures at its top, and what it lacks."""
    figures = {figure.name: figure.value for figure in report.headline.figures}
    passed = None if isinstance(verified, str) else verified.passed
    samples = 0 if report.samples is None else len(report.samples.samples)
    return {
        "path": str(out),
        "bytes": len(page),
        "model": report.headline.model,
        "figures": figures,
        "samples": samples,
        "verified": passed,
        "missing": dict(report.why),
    }
