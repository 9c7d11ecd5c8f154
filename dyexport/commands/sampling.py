"""``dyexport sample``: pictures from labels or from prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dyexport.commands.run_side import BundleArgument, MemoryOption, SchedulerOption, TargetOption
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, progress_bar
from dyexport.errors import UsageError

if TYPE_CHECKING:
    import torch

app = typer.Typer()

Advance = Callable[[int, int], None]


class _Drawn(NamedTuple):
    """Pixels in [0, 1], (B, C, H, W), of videos (B, F, C, H, W), or latents; and what was asked for, for ``--json``."""

    values: torch.Tensor
    pixels: bool
    settings: dict[str, Any]


@app.command()
def sample(
    bundle: BundleArgument,
    labels: Annotated[str, typer.Option(help="Classes to draw: 0-9, 3,7 or both kinds mixed.")] = "0-9",
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
        Path | None, typer.Option("--out", "-o", help="By default samples.png, for videos samples.gif; or .mp4.")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw pictures or videos, one for each label or prompt; without a VAE a latent-space model's latents are saved."""
    with chatter_on_stderr(), progress_bar("sampling") as advance:
        from dyexport.runtime.pipeline import load

        classes = parse_labels(labels)
        loaded = load(bundle, target=target, memory=memory)
        out = _checked(out, video=loaded.spec.frames is not None and frames != 1)
        if loaded.spec.classes:
            drawn = _from_labels(loaded, classes, steps, guidance, seed, scheduler, vae, advance)
        else:
            from dyexport.runtime.prompts import Prompts

            wanted = Prompts(
                texts=tuple(prompt or ()),
                embedded=prompt_embeds,
                pipeline=pipeline or (home_of(loaded.spec.name) if prompt else None),
                vae=vae,
                steps=steps,
                guidance=guidance,
                height=height,
                width=width,
                frames=frames,
                seed=seed,
            )
            drawn = _from_prompts(loaded, wanted, advance)
        written = _save(drawn, out)
    what = "" if drawn.pixels else " (latents; pass --vae with the autoencoder of this model to get pictures)"
    payload = {"path": str(written), **drawn.settings}
    emit(payload, as_json=json, human=lambda console: console.print(f"{written}{what}", markup=False, soft_wrap=True))


def _checked(out: Path | None, *, video: bool) -> Path:
    """Where to write, refused before anything is drawn if no video can be written there."""
    if not video:
        return out or Path("samples.png")
    from dyexport.bench.videos import check_video_path

    out = out or Path("samples.gif")
    check_video_path(out)
    return out


def _save(drawn: _Drawn, out: Path) -> Path:
    from dyexport.bench.pictures import save_sample

    values = drawn.values
    if drawn.pixels and values.ndim == 5:
        if values.shape[1] > 1:
            from dyexport.bench.videos import save_video

            save_video(values.cpu().numpy(), out)
            return out
        values = values.squeeze(1)  # a picture
    return save_sample(values, out, pixels=drawn.pixels)


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
    from dyexport.runtime.sampling import LABEL_HABITS, decode, open_vae
    from dyexport.runtime.sampling import sample as draw

    steps = LABEL_HABITS.steps if steps is None else steps
    guidance = LABEL_HABITS.guidance if guidance is None else guidance
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
    from dyexport.runtime.prompts import draw_prompts

    drawn = draw_prompts(loaded, wanted, advance)
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
    """``0-2,7`` is 0, 1, 2, 7. Raises ``UsageError`` for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UsageError(f"--labels {text!r} is not a list of classes; write 0-9 or 3,7")
        found += range(int(first), int(last) + 1)
    return found
