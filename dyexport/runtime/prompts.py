"""Sampling from prompts, by the model's own diffusers pipeline around a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dyexport.arguments import PIXELS, check_pixels
from dyexport.backbones.sampling import PromptColumns, PromptPipeline, dtype_argument
from dyexport.errors import CheckpointError, DataError, MissingDependencyError
from dyexport.progress import Progress
from dyexport.runtime.prompt_settings import Prompts, prompt_pipeline
from dyexport.runtime.sampling import Observer, check_finite, no_observer, noise_of, open_vae
from dyexport.runtime.transformer import BundleTransformer


class PromptSamples(NamedTuple):
    """Pixels in [0, 1], (B, 3, H, W) or (B, F, 3, H, W); without a VAE the pipeline's latents.

    ``settings`` are the steps, the guidance scale and the class of the scheduler.
    """

    values: torch.Tensor
    pixels: bool
    settings: Mapping[str, Any]


@torch.inference_mode()
def sample_prompts(
    transformer: BundleTransformer,
    prompts: Prompts,
    progress: Progress | None = None,
    *,
    pipe: Any = None,
    observe: Observer = no_observer,
) -> PromptSamples:
    """Sample one picture or video per prompt; ``pipe`` is the pipeline if it is open already.

    Raises ``CheckpointError`` if the pipeline cannot be read, ``DataError`` for embeddings that do not fit the model,
    ``UsageError`` for values out of range, and ``SamplingError`` if the result is not finite.
    """
    spec, kind = transformer.spec, prompt_pipeline(transformer.spec)
    steps = prompts.steps or kind.defaults(spec).steps
    guidance = prompts.guidance_for(spec)
    arguments = prompts.arguments_for(spec)
    conditions: dict[str, Any] = {"prompt": list(prompts.texts)}
    if prompts.embedded is not None:
        conditions = read_embedded(prompts.embedded, kind.columns(spec, guided=guidance is not None and guidance > 1))
    count = len(prompts.texts) or len(conditions["prompt_embeds"])
    generator = noise_of(prompts.seed, count)
    if pipe is None:
        prompts.check_sources(spec)
        pipe = _pipeline(transformer, kind, prompts)
    side = kind.side(spec, pipe.vae_scale_factor)
    check_pixels(prompts.height or side, prompts.width or side, PIXELS, "dyexport")
    latents: list[torch.Tensor] = []

    def advance(_pipe: Any, step: int, _t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [kept["latents"]]
        observe(kept["latents"])
        if progress is not None:
            progress(step + 1, steps)
        return kept

    output = pipe(
        **conditions,
        **arguments,
        height=prompts.height,
        width=prompts.width,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent" if pipe.vae is None else "pt",
        callback_on_step_end=advance,
    )
    values = kind.samples(output).float()
    for checked in (*latents, values):  # decoding ends in a clamp, which would hide an infinity
        check_finite(checked)
    settings = {"steps": steps, "guidance": guidance, "scheduler": type(pipe.scheduler).__name__}
    return PromptSamples(values, pipe.vae is not None, settings)


def _pipeline(transformer: BundleTransformer, kind: PromptPipeline, prompts: Prompts) -> Any:
    """Open the pipeline: with its text encoders for texts, without them for embedded prompts."""
    if prompts.pipeline is not None:
        pipe = open_pipeline(transformer, prompts.pipeline, texts=bool(prompts.texts))
    else:
        pipe = _bare_pipeline(transformer, kind, prompts.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_pipeline(transformer: BundleTransformer, source: str, *, texts: bool = True) -> Any:
    """Open the pipeline in a directory or hub repository around a bundle; its own transformer is not read.

    Without ``texts`` its text encoders are not read either. Raises ``CheckpointError``.
    """
    kind = prompt_pipeline(transformer.spec)
    absent = {} if texts else dict.fromkeys(kind.text_parts)
    dtype = dtype_argument(torch.bfloat16)
    try:
        return _class_of(kind).from_pretrained(source, transformer=transformer, **dtype, **absent)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"cannot read text encoders and VAE from {source}: {reason}; "
            "give --pipeline with a local copy, or --prompt-embeds with embedded prompts"
        ) from error


def _bare_pipeline(transformer: BundleTransformer, kind: PromptPipeline, vae: str | None) -> Any:
    """Make a pipeline without text encoders."""
    return _class_of(kind)(
        scheduler=kind.scheduler(transformer.spec),
        vae=None if vae is None else open_vae(vae, kind.vae),
        transformer=transformer,
        **dict.fromkeys(kind.text_parts),
    )


def _class_of(kind: PromptPipeline) -> Any:
    import diffusers

    if not diffusers.utils.is_transformers_available():  # its place in diffusers is then taken by a dummy
        raise MissingDependencyError("transformers", "prompts")
    return getattr(diffusers, kind.name)


def read_embedded(file: Path, columns: PromptColumns) -> dict[str, Any]:
    """Read the tensors (n, ...) of embedded prompts from a safetensors file; floats in fp32. Raises ``DataError``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = " and ".join(columns)
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {file}: {error}; give a safetensors file of {names}") from error
    if missing := [name for name in columns if name not in stored]:
        raise DataError(f"{file} lacks {missing[0]}; with this guidance scale it must hold {names}")
    values = {name: _in_fp32(stored[name]) for name in columns}
    rows = len(values["prompt_embeds"])
    if not all(_fits(value.shape, (rows, *columns[name])) for name, value in values.items()):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
        expected = ", ".join(f"{name} (n, {_shown(shape)})" for name, shape in columns.items())
        raise DataError(f"{file} holds {shapes}; this model takes {expected}")
    return values


def _in_fp32(values: torch.Tensor) -> torch.Tensor:
    """Convert floating-point tensors; masks keep their dtype."""
    return values.float() if values.is_floating_point() else values


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(w in (None, s) for s, w in zip(shape, expected, strict=True))


def _shown(shape: tuple[int | None, ...]) -> str:
    return ", ".join("any" if size is None else str(size) for size in shape)
