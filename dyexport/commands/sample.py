"""``dyexport sample``: pictures or videos from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dyexport.arguments import SAMPLES, check_guidance, check_seed, check_steps, shown
from dyexport.commands import options
from dyexport.commands.bundles import at_budget, open_bundle
from dyexport.commands.parsing import ExplicitOptions
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar
from dyexport.errors import UsageError
from dyexport.files import check_file

if TYPE_CHECKING:
    from dyexport.bundle.spec import ModelSpec

EXAMPLES = (
    "dyexport sample sit-digits-0.5 --labels 0-9 -o digits.png",
    "dyexport sample dit-xl-2-0.5 --labels 207,360 --vae stabilityai/sd-vae-ft-ema",
    'dyexport sample flux-0.5 --prompt "a lighthouse at dusk" --steps 20',
)

LABEL_DIGITS = 19  # of a number that an INT64 holds
LABELS, PROMPTS, OUTPUT = "Class-conditional models", "Text-to-image and text-to-video models", "Output"


def sample(
    context: typer.Context,
    bundle: options.BundleArgument,
    budget: options.BundleBudgetOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.", metavar="N")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale; 1 is no guidance. Default: the model's.", metavar="SCALE"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", metavar="N")] = 0,
    target: options.TargetOption = "onnx",
    memory: options.MemoryOption = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes, such as 0-9 or 3,7. Default: the first 10.", metavar="LIST", rich_help_panel=LABELS
        ),
    ] = None,
    scheduler: options.LabelSchedulerOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt; may be repeated.", metavar="TEXT", rich_help_panel=PROMPTS),
    ] = None,
    prompt_embeds: Annotated[
        Path | None,
        typer.Option(
            help="Safetensors file of embedded prompts, instead of --prompt.", metavar="FILE", rich_help_panel=PROMPTS
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Text encoders and VAE. Default: the model's published ones.",
            metavar="DIR|ID",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="Height. Default: the model's.", metavar="PIXELS", rich_help_panel=PROMPTS),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width. Default: the model's.", metavar="PIXELS", rich_help_panel=PROMPTS)
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            help="Frames of a video; 1 samples a picture. Default: the model's.", metavar="N", rich_help_panel=PROMPTS
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="AutoencoderKL that decodes latents; without one they are saved.",
            metavar="DIR|ID",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Default: samples.png, samples.gif for videos (or .mp4), samples.safetensors for latents.",
            metavar="FILE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sample pictures or videos, one for each class label or prompt."""
    if steps is not None:
        check_steps(steps, "--steps")
    if guidance is not None:
        check_guidance(guidance, "--guidance")
    check_seed(seed, "--seed")
    classes = None if labels is None else parse_labels(labels)
    from dyexport.backbones import get_pipeline
    from dyexport.samples import check_arguments

    bundle = at_budget(bundle, budget)
    spec = open_bundle(bundle, target).manifest.model
    _refuse_useless(ExplicitOptions(context), spec)
    arguments: dict[str, Any] = {
        "labels": classes,
        "prompts": prompt,
        "prompt_embeds": prompt_embeds,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "scheduler": scheduler,
        "height": height,
        "width": width,
        "frames": frames,
        "pipeline": pipeline,
        "vae": vae,
    }
    check_arguments(spec, arguments)
    by_labels = get_pipeline(spec.backbone).takes == "labels"
    pixels = vae is not None or (spec.pixel_space if by_labels else bool(prompt or pipeline))
    out = _checked(out, video=spec.frames is not None and frames != 1, pixels=pixels)
    if prompt_embeds is not None and out.exists() and out.samefile(prompt_embeds):
        raise UsageError(f"-o {out} is what --prompt-embeds is read from; give another file")
    with chatter_on_stderr(), progress_bar("sampling") as advance:
        from dyexport.runtime.loading import load
        from dyexport.samples import sample as take_samples

        samples = take_samples(load(bundle, target=target, memory=memory), **arguments, progress=advance)
        if not samples.pixels and out.suffix != ".safetensors":
            raise UsageError(f"the pipeline has no VAE, so -o {out} cannot hold its latents; give --vae")
        samples.save(out)
    note = "" if samples.pixels else " (latents; pass --vae with the autoencoder of this model to get pictures)"
    payload = {"path": str(out), **samples.settings}
    emit(payload, as_json=json, human=lambda console: console.print(f"{out}{note}", markup=False, soft_wrap=True))


def _refuse_useless(explicit: ExplicitOptions, spec: ModelSpec) -> None:
    """Raise ``UsageError`` for an option that is for another kind of model."""
    from dyexport.samples import useless_arguments

    for name, because in useless_arguments(spec).items():
        explicit.refuse(True, because, "prompt" if name == "prompts" else name)


def _checked(out: Path | None, *, video: bool, pixels: bool) -> Path:
    """Return where to write; refuse the name of another kind of file before sampling."""
    if not pixels:
        out = out or Path("samples.safetensors")
        if out.suffix != ".safetensors":
            raise UsageError(f"-o is {out}; latents go into .safetensors, and pictures need a --vae or --pipeline")
    out = out or Path("samples.gif" if video else "samples.png")
    check_file(out)
    if pixels and video:
        from dyexport.bench.videos import check_video_path

        check_video_path(out)
    if pixels and not video and out.suffix.lower() not in ("", ".png"):
        raise UsageError(f"-o is {out}; a picture goes into .png")
    return out


def parse_labels(text: str) -> list[int]:
    """Parse ``0-2,7`` into 0, 1, 2, 7. Raises ``UsageError`` for anything else and for more than one batch holds."""
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = (end.strip() for end in part.partition("-"))
        last = last if dash else first
        if not (_is_label(first) and _is_label(last) and int(first) <= int(last)):
            raise UsageError(f"--labels {shown(text)!r} is not a list of classes; write 0-9 or 3,7")
        if len(labels) + int(last) - int(first) >= SAMPLES:
            raise UsageError(f"--labels {shown(text)!r} are more than {SAMPLES}, which is the largest batch")
        labels += range(int(first), int(last) + 1)
    return labels


def _is_label(text: str) -> bool:
    return text.isdecimal() and len(text) < LABEL_DIGITS
