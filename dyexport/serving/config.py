"""What a served model is made of, as its Triton configuration keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError

from dyexport.arguments import PIXELS, STEPS
from dyexport.bundle.manifest import Frozen, ModelSpec, first_problem
from dyexport.errors import UsageError
from dyexport.serving.requests import Limits

PROMPT_CHARACTERS = 1_000_000  # of which a server may be made to take
BUNDLE, PIPELINE, VAE = "bundle", "pipeline", "vae"  # folders beside model.py


class ServedModelConfig(Frozen):
    """One model. ``pipeline`` (text encoders and VAE) and ``vae`` are folders beside ``model.py``, or hub ids.

    ``share_weights`` lets the engines of all instances map one copy of the weights.
    """

    target: str = "onnx"
    pipeline: str | None = None
    vae: str | None = None
    scheduler: str | None = None
    memory: str | None = None
    share_weights: bool = False
    max_steps: Annotated[PositiveInt, Field(le=STEPS)] = Limits.max_steps
    max_pixels: Annotated[PositiveInt, Field(le=PIXELS)] = Limits.max_pixels
    max_prompt: Annotated[PositiveInt, Field(le=PROMPT_CHARACTERS)] = Limits.max_prompt

    @property
    def limits(self) -> Limits:
        return Limits(max_steps=self.max_steps, max_pixels=self.max_pixels, max_prompt=self.max_prompt)

    def parameters(self) -> dict[str, str]:
        """As Triton keeps them: strings."""
        return {name: str(value) for name, value in self.model_dump().items() if value is not None}

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ServedModelConfig:
        """From a model's configuration, as Triton hands it over. Raises ``UsageError``."""
        values = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            given = values[str(error.errors()[0]["loc"][0])]
            raise UsageError(f"parameters of config.pbtxt: {first_problem(error)}; it is {given!r}") from error


class Output(Frozen):
    """What a request is answered with, beside the seeds: ``dims`` without the batch, -1 for what varies."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def output_of(spec: ModelSpec, *, decoded: bool) -> Output:
    """Pictures (H, W, C), videos (F, H, W, C), both in 8 bits, or latents where no VAE decodes them."""
    if not decoded:
        return Output(name="latents", data_type="TYPE_FP32", dims=spec.latent_shape)
    if spec.frames is not None:
        return Output(name="video", data_type="TYPE_UINT8", dims=(-1, -1, -1, -1))
    return Output(name="image", data_type="TYPE_UINT8", dims=(-1, -1, -1))


def source_of(folder: Path, value: str) -> str:
    """A folder beside ``model.py``, or else a hub id."""
    beside = folder / value
    return str(beside) if beside.is_dir() else value
