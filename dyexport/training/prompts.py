"""Prompts for a model that makes its own training data: texts, and their embeddings by the model's own encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dyexport.backbones.base import Preset
from dyexport.errors import CheckpointError, DataError
from dyexport.models.conditions import Conditions
from dyexport.training.state import ORIGIN, origin_of, write_tensors

SUBJECTS = (
    "a red fox", "an old sailor", "a glass of water", "a steam train", "a city street in the rain", "a bowl of fruit",
    "a mountain lake", "two children playing chess", "a woman reading a letter", "a robot in a workshop",
    "a bicycle against a brick wall", "a flock of birds", "a wooden house", "a cup of coffee", "a dancer on a stage",
    "a sign that says OPEN", "a desert road", "an astronaut", "a cat asleep on a sofa", "a market full of people",
    "a lighthouse", "a vintage car", "a slice of cake", "a dog catching a ball", "a violin on a table",
)  # fmt: skip
SETTINGS = (
    "photograph, natural light", "close-up, shallow depth of field", "at night, neon lights", "oil painting",
    "watercolour on paper", "pencil sketch", "isometric 3D render", "seen from above, wide angle",
    "black and white film", "flat vector illustration", "in thick fog at dawn", "studio lighting, plain background",
)  # fmt: skip
EMBEDDED_AT_ONCE = 8


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """One prompt a line; without a file, 300 of everyday subjects in many styles. Raises ``DataError``."""
    if file is None:
        return tuple(f"{subject}, {setting}" for subject, setting in product(SUBJECTS, SETTINGS))
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}; --prompts takes a text file, one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DataError(f"{file} holds no prompts; write one a line")
    return prompts


def embed_prompts(source: str, prompts: tuple[str, ...], preset: Preset, *, device: str = "cpu") -> Conditions:
    """By the text encoders of the pipeline in a directory or hub repository; nothing else of it is read.

    Raises ``CheckpointError`` where they cannot be read.
    """
    import diffusers

    embedder = EMBEDDERS[preset.backbone]
    try:
        pipe = getattr(diffusers, embedder.pipeline).from_pretrained(
            source, transformer=None, vae=None, torch_dtype=torch.bfloat16
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"cannot read text encoders from {source} ({reason}), and without them the model cannot make its own data; "
            "give --data with a directory of latents, or --finetune-steps 0"
        ) from error
    pipe.to(device)
    if embedder.guided:
        prompts = with_empty(prompts)
    parts = [prompts[start : start + EMBEDDED_AT_ONCE] for start in range(0, len(prompts), EMBEDDED_AT_ONCE)]
    with torch.inference_mode():
        rows = [embedder.embed(pipe, list(texts), preset.text_tokens) for texts in parts]
    return {name: torch.cat([row[name].float().cpu() for row in rows]) for name in rows[0]}


def kept_prompts(file: Path, embed: Callable[[], Conditions], origin: str) -> Conditions:
    """Return what ``embed`` returns, cached in ``file`` for the same ``origin``."""
    if origin_of(file) == origin:
        return load_file(file)
    embedded = embed()
    write_tensors(file, embedded, {ORIGIN: origin})
    return embedded


def with_empty(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """One more in ten that says nothing: what classifier-free guidance asks the network about too."""
    return (*prompts, *[""] * ceil(len(prompts) / 9))


def _flux(pipe: Any, texts: list[str], tokens: int) -> Conditions:
    """(B, T, J), (B, P)"""
    embedded, pooled, _ = pipe.encode_prompt(texts, None, max_sequence_length=tokens)
    return {"encoder_hidden_states": embedded, "pooled_projections": pooled}


def _latte(pipe: Any, texts: list[str], tokens: int) -> Conditions:
    """(B, T, J), zero where a prompt has ended, as the pipeline has them for several prompts; longer ones are cut."""
    embedded, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": F.pad(embedded, (0, 0, 0, tokens - embedded.shape[1]))}


class Embedder(NamedTuple):
    """How the pipeline of a backbone embeds prompts, and whether it is guided by the absence of one."""

    pipeline: str
    embed: Callable[[Any, list[str], int], Conditions]
    guided: bool


EMBEDDERS: Mapping[str, Embedder] = {
    "flux": Embedder("FluxPipeline", _flux, guided=False),
    "latte": Embedder("LattePipeline", _latte, guided=True),
}
