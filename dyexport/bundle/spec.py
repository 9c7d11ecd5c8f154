"""Description of the model that a bundle was cut from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from dyexport.bundle.records import Frozen
from dyexport.lora import LoraSpec

Precision = Literal["fp32", "fp16", "bf16"]
Quantization = Literal["int8", "fp8"]  # fp8 is E4M3: four bits of exponent, three of mantissa

Widths = Literal["dynamic", "static"]
"""Widths that follow the timestep, with token routers; or one slim network for all timesteps and every token."""

TokenRouterKind = Literal["published", "compact"]
"""Kind of token routers: the published form, or ``compact``: C -> C / 16 -> 1 on the modulated input of the MLP."""


class ModelSpec(Frozen):
    """Description of a model for pipelines; ``config`` is its diffusers configuration.

    ``latent_shape`` is of one sample as the network takes it: (C, H, W), (C, F, H, W) of a video, (N, C) packed.
    ``precision`` is that of weights and products; inputs and outputs of a network are in fp32. With
    ``quantization`` the linear layers of attention and MLP have weights and inputs in eight bits.
    """

    name: str
    backbone: str
    objective: Literal["ddpm", "flow", "flow-sigma"]
    timestep_range: tuple[float, float]
    latent_shape: tuple[PositiveInt, ...]
    tokens: PositiveInt  # that a router may skip
    text_tokens: NonNegativeInt = 0
    classes: NonNegativeInt
    pixel_space: bool
    config: dict[str, Any]
    precision: Precision = "fp32"
    quantization: Quantization | None = None
    td_lora: LoraSpec | None = None  # whose gates the conditioning network computes
    token_router: TokenRouterKind | None = None  # None: without routers, of one possible kind, or older than the choice
    hub_id: str | None = None  # repository that the model came from, with its text encoders and VAE

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``token_router`` out where it is None: hashes of older graphs do not cover it."""
        values: dict[str, Any] = handler(self)
        if values.get("token_router") is None:
            values.pop("token_router", None)
        return values

    @property
    def number_formats(self) -> str:
        """Formats as text: ``fp16, linear layers in int8``."""
        suffix = "" if self.quantization is None else f", linear layers in {self.quantization}"
        return f"{self.precision}{suffix}"

    @property
    def noise_to_data(self) -> tuple[float, float]:
        """The ends of ``timestep_range`` in the order in which sampling visits them."""
        start, end = self.timestep_range
        return (start, end) if self.objective == "flow" else (end, start)

    @property
    def frames(self) -> int | None:
        """Number of frames of a video; None for a model of pictures."""
        return self.latent_shape[1] if len(self.latent_shape) == 4 else None
