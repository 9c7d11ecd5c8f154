"""``dyexport deploy``: a bundle as a model of an inference server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dyexport.commands.given import Given, OnceEach
from dyexport.commands.options import BundleArgument, MemoryOption, SchedulerOption, TargetOption
from dyexport.console import DebugOption, JsonOption, emit, progress_bar

deploy = typer.Typer(no_args_is_help=True, add_completion=False)


@deploy.callback()
def _servers() -> None:
    """Write a bundle as a model of an inference server."""


@deploy.command(cls=OnceEach)
def triton(
    context: typer.Context,
    bundle: BundleArgument,
    repository: Annotated[Path, typer.Argument(help="A Triton model repository; made where there is none.")],
    name: Annotated[str | None, typer.Option(help="Of the model; by default the bundle's.")] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(help="FLUX, Latte: text encoders and VAE, a directory or hub id; by default the model's own."),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="DiT, SiT: AutoencoderKL, a directory or a hub id; without it the server returns latents."),
    ] = None,
    target: TargetOption = "onnx",
    scheduler: SchedulerOption = None,
    memory: MemoryOption = None,
    instances: Annotated[int, typer.Option(help="Copies that work side by side, each a process.")] = 1,
    max_batch: Annotated[
        int | None, typer.Option(help="Samples drawn together at most; by default 8, FLUX and Latte 1.")
    ] = None,
    max_steps: Annotated[int, typer.Option(help="Denoising steps that a request may ask for.")] = 100,
    max_pixels: Annotated[int, typer.Option(help="FLUX, Latte: pixels that a request may ask for.")] = 2048 * 2048,
    max_prompt: Annotated[int, typer.Option(help="FLUX, Latte: characters that a prompt may have.")] = 4000,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a model that samples inside Triton's Python backend: a label or prompt in, a picture or video out."""
    from dyexport.bundle.reader import Bundle
    from dyexport.commands.sample import home_of
    from dyexport.serving.triton_repository import Deployment
    from dyexport.serving.triton_repository import deploy as write

    spec = Bundle.open(bundle, check_hashes=False).manifest.model
    Given(context).refuse(bool(spec.classes), f"{spec.name} draws from labels, at one size", "max_pixels", "max_prompt")
    deployment = Deployment(
        bundle=bundle,
        repository=repository,
        name=bundle.absolute().name if name is None else name,
        pipeline=pipeline or (None if spec.classes else home_of(spec.name)),
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
    told = (
        f"{model}\n"
        f"Start it, dyexport being installed in the server's Python: tritonserver --model-repository {repository}"
    )
    emit(payload, as_json=json, human=lambda console: console.print(told, markup=False, soft_wrap=True))
