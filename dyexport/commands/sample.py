"""``dyexport sample``: pictures from labels or from prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dyexport.arguments import SAMPLES, check_guidance, check_seed, check_steps, shown
from dyexport.backbones import sampling_defaults
from dyexport.bundle.manifest import ModelSpec
from dyexport.commands.given import Given
from dyexport.commands.options import BundleArgument, MemoryOption, SchedulerOption, TargetOption
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar
from dyexport.errors import UsageError
from dyexport.files import check_file

if TYPE_CHECKING:
    import torch

Advance = Callable[[int, int], None]

DEFAULT_CLASSES = 10
LABEL_DIGITS = 19  # of a number that an INT64 holds


class _Drawn(NamedTuple):
    """Pixels in [0, 1], (B, C, H, W), of videos (B, F, C, H, W), or latents; and what was asked for, for ``--json``."""

    values: torch.Tensor
    pixels: bool
    settings: dict[str, Any]


def sample(
    context: typer.Context,
    bundle: BundleArgument,
    labels: Annotated[
        str | None,
        typer.Option(help="DiT, SiT: classes to draw, 0-9, 3,7 or both kinds mixed; by default the first 10."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="FLUX, Latte: what to draw; may be given several times.")
    ] = None,
    prompt_embeds: Annotated[
        Path | None, typer.Option(help="FLUX, Latte: a safetensors file of embedded prompts, instead of --prompt.")
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(help="FLUX, Latte: text encoders and VAE, a directory or hub id; by default the model's own."),
    ] = None,
    height: Annotated[int | None, typer.Option(help="FLUX, Latte: pixels; by default 1024, or 512.")] = None,
    width: Annotated[int | None, typer.Option(help="FLUX, Latte: pixels; by default 1024, or 512.")] = None,
    frames: Annotated[int | None, typer.Option(help="Latte: 1 for a picture; by default the 16 it knows.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default 50, FLUX 28, FLUX-schnell 4.")] = None,
    scheduler: SchedulerOption = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; by default 1.5, FLUX 3.5, Latte 7.5. 1 is none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    target: TargetOption = "onnx",
    memory: MemoryOption = None,
    vae: Annotated[
        str | None, typer.Option(help="AutoencoderKL that decodes latents: a directory or a hub id.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="By default samples.png, for videos samples.gif (or .mp4), for latents samples.safetensors.",
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw pictures or videos, one for each label or prompt; without a VAE a latent-space model's latents are saved."""
    _check_numbers(steps, guidance, seed)
    classes = None if labels is None else parse_labels(labels)
    with chatter_on_stderr(), progress_bar("sampling") as advance:
        from dyexport.bundle.reader import Bundle
        from dyexport.runtime.loading import load

        spec = Bundle.open(bundle, check_hashes=False).manifest.model
        _refuse_useless(Given(context), spec)
        pixels = vae is not None or (spec.pixel_space if spec.classes else bool(prompt or pipeline))
        out = _checked(out, video=spec.frames is not None and frames != 1, pixels=pixels)
        if prompt_embeds is not None and out.exists() and out.samefile(prompt_embeds):
            raise UsageError(f"-o {out} is what --prompt-embeds is read from; give another file")
        loaded = load(bundle, target=target, memory=memory)
        if spec.classes:
            classes = classes or list(range(min(spec.classes, DEFAULT_CLASSES)))
            drawn = _from_labels(loaded, classes, steps, guidance, seed, scheduler, vae, advance)
        else:
            from dyexport.runtime.prompts import Prompts

            wanted = Prompts(
                texts=tuple(prompt or ()),
                embedded=prompt_embeds,
                pipeline=pipeline or (home_of(spec.name) if prompt else None),
                vae=vae,
                steps=steps,
                guidance=guidance,
                height=height,
                width=width,
                frames=frames,
                seed=seed,
            )
            drawn = _from_prompts(loaded, wanted, advance)
        _save(drawn, out)
    what = "" if drawn.pixels else " (latents; pass --vae with the autoencoder of this model to get pictures)"
    payload = {"path": str(out), **drawn.settings}
    emit(payload, as_json=json, human=lambda console: console.print(f"{out}{what}", markup=False, soft_wrap=True))


def _check_numbers(steps: int | None, guidance: float | None, seed: int) -> None:
    """Before anything is read."""
    if steps is not None:
        check_steps(steps, "--steps")
    if guidance is not None:
        check_guidance(guidance, "--guidance")
    check_seed(seed, "--seed")


def _refuse_useless(given: Given, spec: ModelSpec) -> None:
    """Raises ``UsageError`` for an option that is for another kind of model."""
    for_prompts = ("prompt", "prompt_embeds", "pipeline", "height", "width", "frames")
    given.refuse(bool(spec.classes), f"{spec.name} draws from labels", *for_prompts)
    given.refuse(not spec.classes, f"{spec.name} draws from prompts", "labels")
    given.refuse(not spec.classes, f"the scheduler of {spec.name} comes with its pipeline", "scheduler")
    given.refuse(spec.pixel_space, f"{spec.name} draws pixels, not latents", "vae")
    given.refuse(sampling_defaults(spec).guidance is None, f"{spec.name} knows no guidance", "guidance")


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


def _save(drawn: _Drawn, out: Path) -> None:
    from dyexport.bench.pictures import save_sample

    values = drawn.values
    if not drawn.pixels and out.suffix != ".safetensors":
        raise UsageError(f"the pipeline has no VAE, so -o {out} is no place for what it draws; give --vae")
    if drawn.pixels and values.ndim == 5:
        if values.shape[1] > 1:
            from dyexport.bench.videos import save_video

            save_video(values.cpu().numpy(), out)
            return
        values = values.squeeze(1)  # a picture
    save_sample(values, out, pixels=drawn.pixels)


def _from_labels(
    loaded: Any,
    labels: list[int],
    steps: int | None,
    guidance: float | None,
    seed: int,
    scheduler: str | None,
    vae: str | None,
    advance: Advance,
) -> _Drawn:
    from dyexport.runtime.sampling import decode, open_vae
    from dyexport.runtime.sampling import sample as draw

    default = sampling_defaults(loaded.spec)
    steps = default.steps if steps is None else steps
    guidance = default.guidance if guidance is None else guidance
    drawn = draw(
        _Counted(loaded, steps, advance),
        loaded.spec,
        labels,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance,
        seed=seed,
    )  # (B, C, H, W)
    settings = {"labels": labels, "steps": steps, "guidance": guidance, "seed": seed}
    if vae is not None:
        return _Drawn(decode(open_vae(vae), drawn), True, settings)
    return _Drawn(drawn, loaded.spec.pixel_space, settings)


def _from_prompts(loaded: Any, wanted: Any, advance: Advance) -> _Drawn:
    from dyexport.runtime.prompts import sample_prompts

    drawn = sample_prompts(loaded, wanted, advance)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(wanted).items() if v is not None}
    return _Drawn(drawn.values, drawn.pixels, settings)


def home_of(model: str) -> str | None:
    """The hub repository of a preset, which holds its text encoders and VAE."""
    from dyexport.presets import PRESETS

    return PRESETS[model].hub_id if model in PRESETS else None


class _Counted:
    """A transformer that moves a progress bar on with every call."""

    def __init__(self, transformer: Any, steps: int, advance: Advance) -> None:
        self.transformer = transformer
        self.device = transformer.device
        self._steps, self._advance, self._done = steps, advance, 0

    def __call__(self, **inputs: Any) -> Any:
        output = self.transformer(**inputs)
        self._done += 1
        self._advance(self._done, self._steps)
        return output


def parse_labels(text: str) -> list[int]:
    """``0-2,7`` is 0, 1, 2, 7. Raises ``UsageError`` for anything else, and for more than are drawn at a time."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        last = last if dash else first
        if not (_is_label(first) and _is_label(last) and int(first) <= int(last)):
            raise UsageError(f"--labels {shown(text)!r} is not a list of classes; write 0-9 or 3,7")
        if len(found) + int(last) - int(first) >= SAMPLES:
            raise UsageError(f"--labels {shown(text)!r} are more than {SAMPLES}, which are drawn at a time")
        found += range(int(first), int(last) + 1)
    return found


def _is_label(text: str) -> bool:
    return text.isdecimal() and len(text) < LABEL_DIGITS
