"""Pictures from prompts: diffusers' own text-to-image pipeline around a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dyexport.errors import CheckpointError, DataError, UsageError
from dyexport.runtime.pipeline import BundleTransformer
from dyexport.runtime.sampling import open_vae

if TYPE_CHECKING:
    from diffusers import FluxPipeline

Progress = Callable[[int, int], None]
"""Called with denoising steps done and steps in all."""

EMBEDDED = ("prompt_embeds", "pooled_prompt_embeds")
STEPS = {True: 28, False: 4}  # by whether the model embeds its guidance scale: FLUX.1-dev and -schnell


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to draw, and how. Either ``texts``, or ``embedded``: a safetensors file of their embeddings.

    ``pipeline`` is where text encoders and VAE come from, a directory or hub repository; embedded prompts need
    none, and get a VAE from there or from ``vae``. Sizes in pixels; None takes the pipeline's own.
    """

    texts: tuple[str, ...] = ()
    embedded: Path | None = None
    pipeline: str | None = None
    vae: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.texts) == (self.embedded is not None):
            raise UsageError("give --prompt, or --prompt-embeds with a file of embedded prompts; one of the two")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or value % 16):
                raise UsageError(f"--{name} is {value}; give a multiple of 16")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps is {self.steps}; give at least 1")
        if self.vae is not None and (self.texts or self.pipeline):
            raise UsageError("--vae goes with --prompt-embeds alone; a pipeline has its own")


class Drawn(NamedTuple):
    """Pixels in [0, 1], (B, 3, H, W), or, where there is no VAE, packed latents (B, N, C)."""

    values: torch.Tensor
    pixels: bool


@torch.inference_mode()
def draw_prompts(transformer: BundleTransformer, wanted: Prompts, progress: Progress | None = None) -> Drawn:
    """One picture for each prompt.

    Raises ``CheckpointError`` where the pipeline cannot be read and ``DataError`` for embeddings that do not fit.
    """
    spec = transformer.spec
    conditions = {"prompt": list(wanted.texts)} if wanted.texts else read_embedded(wanted.embedded, spec.config)
    pipe = _pipeline(transformer, wanted)
    steps = wanted.steps or STEPS[bool(spec.config["guidance_embeds"])]

    def advance(_pipe: Any, step: int, _t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(step + 1, steps)
        return kept

    values = pipe(
        **conditions,
        height=wanted.height,
        width=wanted.width,
        num_inference_steps=steps,
        guidance_scale=3.5 if wanted.guidance is None else wanted.guidance,
        generator=torch.Generator().manual_seed(wanted.seed),
        output_type="latent" if pipe.vae is None else "pt",
        callback_on_step_end=advance,
    ).images
    return Drawn(values.float(), pixels=pipe.vae is not None)


def _pipeline(transformer: BundleTransformer, wanted: Prompts) -> FluxPipeline:
    """With texts a whole one; embedded prompts need the VAE at most."""
    if wanted.pipeline is not None:
        pipe = open_pipeline(transformer, wanted.pipeline, texts=bool(wanted.texts))
    elif wanted.texts:
        raise UsageError(f"no text encoders of {transformer.spec.name} are known; give --pipeline DIR")
    else:
        pipe = _bare_pipeline(transformer, wanted.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_pipeline(transformer: BundleTransformer, source: str, *, texts: bool = True) -> FluxPipeline:
    """The pipeline in a directory or hub repository with the bundle as its transformer, whose own is not read.

    Without ``texts`` the text encoders stay unread too.
    """
    from diffusers import FluxPipeline

    absent = {} if texts else dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    try:
        return FluxPipeline.from_pretrained(source, transformer=transformer, torch_dtype=torch.bfloat16, **absent)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"cannot read text encoders and VAE from {source}: {reason}; "
            "give --pipeline with a local copy, or --prompt-embeds with embedded prompts"
        ) from error


def _bare_pipeline(transformer: BundleTransformer, vae: str | None) -> FluxPipeline:
    """From embedded prompts to latents; the schedule is that of the model's own pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    shifted = bool(transformer.spec.config["guidance_embeds"])  # FLUX.1-dev's steps follow the resolution
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifted),
        vae=None if vae is None else open_vae(vae),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def read_embedded(file: Path | None, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` (n, T, C_text) and ``pooled_prompt_embeds`` (n, C_pooled) of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    assert file is not None
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {file}: {error}; give a safetensors file of {' and '.join(EMBEDDED)}") from error
    if missing := [name for name in EMBEDDED if name not in found]:
        raise DataError(f"{file} lacks {missing[0]}; it must hold {' and '.join(EMBEDDED)}")
    text, pooled = (found[name].float() for name in EMBEDDED)  # (n, T, J), (n, P)
    sizes = (config["joint_attention_dim"], config["pooled_projection_dim"])
    if text.ndim != 3 or pooled.ndim != 2 or len(text) != len(pooled) or (text.shape[2], pooled.shape[1]) != sizes:
        raise DataError(
            f"{file}: {EMBEDDED[0]} are {tuple(text.shape)} and {EMBEDDED[1]} {tuple(pooled.shape)}; "
            f"this model takes (n, any, {sizes[0]}) and (n, {sizes[1]})"
        )
    return dict(zip(EMBEDDED, (text, pooled), strict=True))
