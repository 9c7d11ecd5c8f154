"""Configuration of a served model, as parameters of its Triton configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError

from dyexport.arguments import PIXELS, STEPS
from dyexport.bundle.records import Frozen, first_problem
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import UsageError
from dyexport.serving.limits import Limits

PROMPT_CHARACTERS = 1_000_000  # largest max_prompt
BUNDLE, PIPELINE, VAE = "bundle", "pipeline", "vae"  # folders next to model.py


class ServedModelConfig(Frozen):
    """Configuration of one model.

    pipeline, vae  folders next to ``model.py``, or hub ids; a pipeline has text encoders and a VAE
    memory         most bytes of weights, such as 8GiB
    share_weights  let the engines of all instances map one copy of the weights
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
        """Return the configuration as Triton's parameters, which are strings."""
        return {name: str(value) for name, value in self.model_dump().items() if value is not None}

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ServedModelConfig:
        """Read it from a model's Triton configuration. Raises ``UsageError`` naming a wrong parameter."""
        values = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            value = values[str(error.errors()[0]["loc"][0])]
            raise UsageError(f"parameters of config.pbtxt: {first_problem(error)}; it is {value!r}") from error


class OutputSpec(Frozen):
    """The tensor of a response that holds samples; ``dims`` has no batch, and -1 where the size varies."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def output_of(spec: ModelSpec, *, decoded: bool) -> OutputSpec:
    """Return the output: pictures (H, W, C) or videos (F, H, W, C) in 8 bits, or latents if no VAE decodes them."""
    if not decoded:
        return OutputSpec(name="latents", data_type="TYPE_FP32", dims=spec.latent_shape)
    if spec.frames is not None:
        return OutputSpec(name="video", data_type="TYPE_UINT8", dims=(-1, -1, -1, -1))
    return OutputSpec(name="image", data_type="TYPE_UINT8", dims=(-1, -1, -1))


def source_of(folder: Path, value: str) -> str:
    """Return the path of a folder next to ``model.py``, or a hub id."""
    path = folder / value
    return str(path) if path.is_dir() else value
