"""Embeddings of the prompts for synthetic data, by the model's own text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Preset, PromptConditioning
from dyexport.backbones.sampling import dtype_argument
from dyexport.errors import CheckpointError, MissingDependencyError, reason
from dyexport.models.conditions import Conditions
from dyexport.training.state import ORIGIN, origin_of, write_tensors

EMBEDDED_AT_ONCE = 8


def embed_prompts(source: str, prompts: tuple[str, ...], preset: Preset, *, device: str = "cpu") -> Conditions:
    """Embed prompts with the text encoders of the pipeline in a directory or hub repository, in fp32.

    A model with classifier-free guidance learns its unconditional prompt too, which is appended. Nothing else of the
    pipeline is read. Raises ``CheckpointError`` where the encoders cannot be read.
    """
    conditioning = cast("PromptConditioning", get_conditioning(preset))
    cure = (
        "without them the model cannot make its own data; give --data with a directory of latents, or "
        "--finetune-steps 0"
    )
    pipe = open_text_encoders(source, preset, device=device, cure=cure)
    if conditioning.unconditional is not None:
        prompts = with_unconditional(prompts, conditioning.unconditional)
    return {name: values.float() for name, values in embed_texts(pipe, prompts, conditioning).items()}


def open_text_encoders(source: str, preset: Preset, *, device: str, cure: str) -> Any:
    """Open a pipeline in bf16 with its text encoders alone. Raises ``CheckpointError`` that ends in ``cure``."""
    import diffusers

    if not diffusers.utils.is_transformers_available():  # its place in diffusers is then taken by a dummy
        raise MissingDependencyError("transformers", "prompts")
    try:
        pipe = getattr(diffusers, preset.pipeline).from_pretrained(
            source, transformer=None, vae=None, **dtype_argument(torch.bfloat16)
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read text encoders from {source} ({reason(error)}); {cure}") from error
    return pipe.to(device)


def embed_texts(pipe: Any, texts: Sequence[str], conditioning: PromptConditioning) -> Conditions:
    """Embed texts a few at a time, on the pipeline's device; returns them on the CPU."""
    parts = [list(texts[start : start + EMBEDDED_AT_ONCE]) for start in range(0, len(texts), EMBEDDED_AT_ONCE)]
    with torch.inference_mode(), _errors_only():
        rows = [conditioning.embed(pipe, part) for part in parts]
    return {name: torch.cat([row[name].cpu() for row in rows]) for name in rows[0]}


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence libraries, which print each text that a tokenizer cuts: CLIP cuts most captions that T5 reads."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(logging, logging.get_verbosity()) for logging in (of_diffusers, of_transformers)]
    try:
        for logging, _ in levels:
            logging.set_verbosity_error()
        yield
    finally:
        for logging, level in levels:
            logging.set_verbosity(level)


def kept_prompts(file: Path, embed: Callable[[], Conditions], origin: str) -> Conditions:
    """Return the result of ``embed``, cached in ``file`` for the same ``origin``."""
    if origin_of(file) == origin:
        return load_file(file)
    embedded = embed()
    write_tensors(file, embedded, {ORIGIN: origin})
    return embedded


def with_unconditional(prompts: tuple[str, ...], prompt: str) -> tuple[str, ...]:
    """Append the unconditional prompt of classifier-free guidance: one in ten of all prompts."""
    return (*prompts, *[prompt] * ceil(len(prompts) / 9))
