"""Pictures and videos from prompts: diffusers' own pipeline around a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dyexport.arguments import PIXELS, SAMPLES, check_guidance, check_pixels, check_side, check_steps
from dyexport.backbones import get_pipeline
from dyexport.backbones.base import PromptColumns, PromptPipeline
from dyexport.errors import CheckpointError, DataError, MissingDependencyError, UsageError
from dyexport.runtime.sampling import check_finite, noise_of, open_vae
from dyexport.runtime.transformer import BundleTransformer

Progress = Callable[[int, int], None]
"""Called with denoising steps done and steps in all."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to draw, and how. Either ``texts``, or ``embedded``: a safetensors file of their embeddings.

    ``pipeline`` is where text encoders and VAE come from, a directory or hub repository; embedded prompts need
    none, and get a VAE from there or from ``vae``. Sizes in pixels. None takes what is usual for the model.
    ``seed`` is of all of them, or has one for each.
    """

    texts: tuple[str, ...] = ()
    embedded: Path | None = None
    pipeline: str | None = None
    vae: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    seed: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if bool(self.texts) == (self.embedded is not None):
            raise UsageError("give --prompt, or --prompt-embeds with a file of embedded prompts; one of the two")
        if len(self.texts) > SAMPLES:
            raise UsageError(f"there are {len(self.texts)} prompts; draw up to {SAMPLES} at a time")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_side(getattr(self, name), f"--{name}")
        if self.steps is not None:
            check_steps(self.steps, "--steps")
        if self.guidance is not None:
            check_guidance(self.guidance, "--guidance")
        if self.vae is not None and (self.texts or self.pipeline):
            raise UsageError("--vae goes with --prompt-embeds alone; a pipeline has its own")


class Drawn(NamedTuple):
    """Pixels in [0, 1], (B, 3, H, W) or (B, F, 3, H, W), or, where there is no VAE, the pipeline's latents."""

    values: torch.Tensor
    pixels: bool


@torch.inference_mode()
def draw_prompts(
    transformer: BundleTransformer, wanted: Prompts, progress: Progress | None = None, *, pipe: Any = None
) -> Drawn:
    """One picture, or one video, for each prompt; with ``pipe``, where that is open already.

    Raises ``CheckpointError`` where the pipeline cannot be read, ``DataError`` for embeddings that do not fit and
    ``SamplingError`` where what comes out is not finite.
    """
    spec, kind = transformer.spec, get_pipeline(transformer.spec.backbone)
    arguments = kind.arguments(spec, frames=wanted.frames, embedded=wanted.embedded is not None)
    usual = kind.defaults(spec)
    steps, guidance = wanted.steps or usual.steps, usual.guidance if wanted.guidance is None else wanted.guidance
    conditions: dict[str, Any] = {"prompt": list(wanted.texts)}
    if wanted.embedded is not None:
        conditions = read_embedded(wanted.embedded, kind.columns(spec, guided=guidance > 1))
    count = len(wanted.texts) or len(conditions["prompt_embeds"])
    generator = noise_of(wanted.seed, count)
    pipe = _pipeline(transformer, kind, wanted) if pipe is None else pipe
    own = kind.side(spec, pipe.vae_scale_factor)
    check_pixels(wanted.height or own, wanted.width or own, PIXELS, "dyexport")
    latents: list[torch.Tensor] = []

    def advance(_pipe: Any, step: int, _t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [kept["latents"]]
        if progress is not None:
            progress(step + 1, steps)
        return kept

    output = pipe(
        **conditions,
        **arguments,
        height=wanted.height,
        width=wanted.width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type="latent" if pipe.vae is None else "pt",
        callback_on_step_end=advance,
    )
    values = kind.drawn(output).float()
    for drawn in (*latents, values):  # decoding ends in a clamp, which would hide an infinity
        check_finite(drawn)
    return Drawn(values, pixels=pipe.vae is not None)


def _pipeline(transformer: BundleTransformer, kind: PromptPipeline, wanted: Prompts) -> Any:
    """With texts a whole one; embedded prompts need the VAE at most."""
    if wanted.pipeline is not None:
        pipe = open_pipeline(transformer, wanted.pipeline, texts=bool(wanted.texts))
    elif wanted.texts:
        raise UsageError(f"no text encoders of {transformer.spec.name} are known; give --pipeline DIR")
    else:
        pipe = _bare_pipeline(transformer, kind, wanted.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_pipeline(transformer: BundleTransformer, source: str, *, texts: bool = True) -> Any:
    """The pipeline in a directory or hub repository with the bundle as its transformer, whose own is not read.

    Without ``texts`` the text encoders stay unread too.
    """
    kind = get_pipeline(transformer.spec.backbone)
    absent = {} if texts else dict.fromkeys(kind.text_parts)
    try:
        return _class_of(kind).from_pretrained(source, transformer=transformer, torch_dtype=torch.bfloat16, **absent)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"cannot read text encoders and VAE from {source}: {reason}; "
            "give --pipeline with a local copy, or --prompt-embeds with embedded prompts"
        ) from error


def _bare_pipeline(transformer: BundleTransformer, kind: PromptPipeline, vae: str | None) -> Any:
    """From embedded prompts to latents."""
    return _class_of(kind)(
        scheduler=kind.scheduler(transformer.spec),
        vae=None if vae is None else open_vae(vae),
        transformer=transformer,
        **dict.fromkeys(kind.text_parts),
    )


def _class_of(kind: PromptPipeline) -> Any:
    import diffusers

    if not diffusers.utils.is_transformers_available():  # its place in diffusers is then taken by a dummy
        raise MissingDependencyError("transformers", "prompts")
    return getattr(diffusers, kind.name)


def read_embedded(file: Path, columns: PromptColumns) -> dict[str, Any]:
    """The tensors (n, ...) of a safetensors file, n of each."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = " and ".join(columns)
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {file}: {error}; give a safetensors file of {names}") from error
    if missing := [name for name in columns if name not in found]:
        raise DataError(f"{file} lacks {missing[0]}; with this guidance scale it must hold {names}")
    values = {name: found[name].float() for name in columns}
    rows = len(values["prompt_embeds"])
    if not all(_fits(value.shape, (rows, *columns[name])) for name, value in values.items()):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
        wanted = ", ".join(f"{name} (n, {_shown(shape)})" for name, shape in columns.items())
        raise DataError(f"{file} holds {shapes}; this model takes {wanted}")
    return values


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def _shown(shape: tuple[int | None, ...]) -> str:
    return ", ".join("any" if size is None else str(size) for size in shape)
