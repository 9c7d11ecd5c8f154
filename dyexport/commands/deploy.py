"""``dyexport deploy``: a bundle as a model of an inference server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dyexport.commands import options
from dyexport.commands.bundles import open_bundle
from dyexport.commands.parsing import ExplicitOptions, StrictCommand, epilog
from dyexport.console import DebugOption, JsonOption, emit, progress_bar
from dyexport.serving.limits import Limits

EXAMPLES = (
    "dyexport deploy triton dit-xl-2-0.5 models/ --vae stabilityai/sd-vae-ft-ema",
    "dyexport deploy triton flux-0.5 models/ --name flux --max-pixels 1048576",
    "dyexport deploy triton sit-digits-0.5 models/ --instances 2",
)

deploy = typer.Typer(no_args_is_help=True, add_completion=False)

LABELS, PROMPTS, LIMITS = "Class-conditional models", "Text-to-image and text-to-video models", "Limits of a request"


@deploy.callback()
def _servers() -> None:
    """Write a bundle as a model of an inference server."""


@deploy.command(cls=StrictCommand, epilog=epilog(EXAMPLES))
def triton(
    context: typer.Context,
    bundle: options.BundleArgument,
    repository: Annotated[
        Path,
        typer.Argument(help="Triton model repository; created if it does not exist.", metavar="REPOSITORY"),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the bundle's.", metavar="NAME")] = None,
    target: options.TargetOption = "onnx",
    memory: options.MemoryOption = None,
    instances: Annotated[
        int, typer.Option(help="Number of server processes, each with its own copy.", metavar="N")
    ] = 1,
    max_batch: Annotated[
        int | None,
        typer.Option(help="Largest batch. Default: the model's.", metavar="N", rich_help_panel=LIMITS),
    ] = None,
    max_steps: Annotated[
        int, typer.Option(help="Most denoising steps.", metavar="N", rich_help_panel=LIMITS)
    ] = Limits.max_steps,
    vae: Annotated[
        str | None,
        typer.Option(
            help="AutoencoderKL; without one the server returns latents.", metavar="DIR|ID", rich_help_panel=LABELS
        ),
    ] = None,
    scheduler: options.LabelSchedulerOption = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Text encoders and VAE. Default: the model's published ones.",
            metavar="DIR|ID",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Most pixels of a picture.", metavar="N", rich_help_panel=PROMPTS)
    ] = Limits.max_pixels,
    max_prompt: Annotated[
        int, typer.Option(help="Most characters of a prompt.", metavar="N", rich_help_panel=PROMPTS)
    ] = Limits.max_prompt,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a model for Triton's Python backend: a label or prompt in, a picture or video out."""
    from dyexport.backbones import get_pipeline
    from dyexport.runtime.prompt_settings import prompt_pipeline
    from dyexport.serving.triton_repository import Deployment
    from dyexport.serving.triton_repository import deploy as write

    spec = open_bundle(bundle, target).manifest.model
    labels = get_pipeline(spec.backbone).takes == "labels"
    ExplicitOptions(context).refuse(
        labels, f"{spec.name} samples from class labels, at one size", "max_pixels", "max_prompt"
    )
    deployment = Deployment(
        bundle=bundle,
        repository=repository,
        name=bundle.absolute().name if name is None else name,
        pipeline=pipeline or (None if labels else prompt_pipeline(spec).home(spec)),
        vae=vae,
        scheduler=scheduler,
        target=target,
        memory=memory,
        instances=instances,
        max_batch=max_batch,
        max_steps=max_steps,
        max_pixels=max_pixels,
        max_prompt=max_prompt,
    )
    with progress_bar(f"writing {repository / deployment.name}") as advance:
        model = write(deployment, advance)
    payload = {"model": deployment.name, "path": str(model), "config": str(model / "config.pbtxt")}
    text = (
        f"{model}\n"
        f"To start it, with dyexport installed in the server's Python: tritonserver --model-repository {repository}"
    )
    emit(payload, as_json=json, human=lambda console: console.print(text, markup=False, soft_wrap=True))
