"""Contracts of a backbone: what each module of its folder must define. Imports no torch.

| module            | defines                    | used by                                      |
|-------------------|----------------------------|----------------------------------------------|
| ``preset``        | ``Preset``s, ``PRESETS``   | both sides                                   |
| ``masked``        | ``ADAPTER``, an ``Adapter``| the masked model, importance, checkpoints    |
| ``published``     | ``DIALECTS``, ``LORA_LOADER`` | checkpoints with other names than diffusers' |
| ``conditions``    | ``Conditioning``           | training, calibration, synthetic data        |
| ``latents``       | ``latent_format``          | encoding of pictures                         |
| ``cut``, ``slim`` | the functions of ``Slicer``| slicing and export                           |
| ``flops``         | ``count``                  | budgets, plans                               |
| ``engine_sizes``  | ``EngineSizes``' functions | TensorRT                                     |
| ``stand_in``      | ``StandIn``                | ``dyexport.load``, bench                     |
| ``pipeline``      | ``PIPELINE``, a ``SamplingPipeline`` | sampling, serving                  |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Self

from dyexport.backbones.recipe import FULL_FINETUNING, Recipe, recipe_for
from dyexport.bundle.spec import TokenRouterKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dyexport.bundle.plan import Segment
    from dyexport.bundle.plan_info import Profile
    from dyexport.bundle.spec import ModelSpec
    from dyexport.models.conditions import Column, Conditions
    from dyexport.models.gates import BlockGates
    from dyexport.models.routers import TokenRouters
    from dyexport.slicing.slicer import Slice, SliceContext

Inputs = Mapping[str, "Tensor"]
"""Arguments of one forward pass, by the names of the stock module: ``hidden_states``, ``timestep``, and so on."""

Objective = Literal["ddpm", "flow", "flow-sigma"]
UnitChoice = Literal["free", "ordered"]
"""Which units of a block may be on at a timestep: any (``free``), or the first ones (``ordered``)."""

RouterKind = Literal["free", "ordered", "static"]
"""Kind of width routers: those of ``UnitChoice``, or ``static``, whose units are the same at every timestep."""


def channels_of(config: Mapping[str, Any]) -> int:
    """Return the hidden size C of a stock diffusers configuration."""
    channels: int = config["num_attention_heads"] * config["attention_head_dim"]
    return channels


Guidance = Literal["classifier-free", "embedded"]
"""Effect of a guidance scale: it weighs two predictions, or the network takes it as an input (guidance-distilled)."""


class SamplingDefaults(NamedTuple):
    """Default settings of sampling.

    steps      denoising steps
    guidance   guidance scale; None: the model takes none
    scheduler  arguments of the diffusers scheduler of the model's pipeline, where they differ from diffusers' defaults
    """

    steps: int
    guidance: float | None
    scheduler: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Preset(ABC):
    """Backbone architecture, its sizes and its sampling defaults.

    ``objective`` fixes what the network is called with and what it predicts: ``ddpm`` takes the
    integer-valued timestep in [0, 1000) and predicts the noise (DiT, arXiv 2212.09748); ``flow``
    takes t in [0, 1], 0 = noise and 1 = data, and predicts the velocity ``data - noise`` of the
    straight path (SiT, arXiv 2401.08740); ``flow-sigma`` is the same path the other way round, sigma
    in [0, 1], 1 = noise, and predicts ``noise - data`` (FLUX).
    """

    stock: ClassVar[str]
    """Name of the diffusers class: the ``_class_name`` of a checkpoint's configuration."""

    pipeline: ClassVar[str]
    """Name of the model's pipeline class in diffusers."""

    guidance_kind: ClassVar[Guidance] = "classifier-free"

    rescales_guidance: ClassVar[bool] = False
    """True if its pipeline scales a guided prediction back to the norm of the conditional one, token by token."""

    token_routers: ClassVar[tuple[TokenRouterKind, ...]] = ("published",)
    """Kinds of token routers, oldest first: a checkpoint that records none has the first, new models get the last."""

    name: str
    backbone: str
    hidden_size: int
    heads: int
    in_channels: int
    classes: int = 0  # class labels; label `classes` is the null class. 0: not conditioned on classes
    text_tokens: int = 0  # of a prompt, by default
    pixel_space: bool = False  # latents are pixels in [-1, 1]; there is no VAE
    engines: int = 4  # K, unless a build says otherwise: more where weights are so few that a copy for each is nothing
    hub_id: str | None = None
    about: str = ""
    recipe: Recipe = FULL_FINETUNING

    @property
    @abstractmethod
    def objective(self) -> Objective: ...

    @property
    @abstractmethod
    def depth(self) -> int:
        """Blocks that have gates, L."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that a router may skip, N."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Weights of the static model, shared embedders counted once."""

    @abstractmethod
    def transformer_config(self) -> dict[str, object]:
        """Return the arguments of the stock diffusers module."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str | None = None) -> Self:
        """Make the preset of a checkpoint from its diffusers configuration.

        A value that no configuration has, such as the number of text tokens, is that of the published model.
        Raises ``CheckpointError`` naming a key whose value cannot be represented.
        """
        published = cls(name=name or cls.stock)  # type: ignore[call-arg]  # subclasses have defaults
        published = replace(published, recipe=recipe_for(published.parameters, published.tokens))
        return published.with_config(config, name)

    def with_config(self, config: Mapping[str, Any], name: str | None = None) -> Self:
        """Return this preset with the structure of a configuration; itself where the structure is the same."""
        changed = replace(self, **self.structure(config))
        if changed == self:
            return self
        recipe = self.recipe if changed.pixel_space else recipe_for(changed.parameters, changed.tokens)
        return replace(changed, name=name or self.name, about="", recipe=recipe)

    @abstractmethod
    def structure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that a diffusers configuration decides. Raises ``CheckpointError``."""

    def numerics(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return entries of a configuration that change results and no shapes, such as ``norm_eps``, checked."""
        return {}

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Half-open range of the value the transformer is called with."""
        return (0.0, 1000.0) if self.objective == "ddpm" else (0.0, 1.0)

    @classmethod
    @abstractmethod
    def sampling_of(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Return the sampling defaults of a model with this diffusers configuration."""

    @property
    def sampling(self) -> SamplingDefaults:
        """Default settings of sampling: in Python, on the command line, in a server, for synthetic data."""
        return self.sampling_of(self.transformer_config())

    def with_guidance(self, scale: float | None) -> Self:
        """Return the preset whose network is called with this guidance scale; itself without embedded guidance."""
        return self

    def with_tokens(self, tokens: int) -> Self:
        """Return the preset at the size that makes so many tokens, where the configuration does not fix it."""
        return self

    def recorded(self, token_router: TokenRouterKind | None) -> TokenRouterKind | None:
        """Return a kind of token routers as files record it: None where the backbone has no other."""
        return token_router if len(self.token_routers) > 1 else None

    def for_noise(self) -> Self:
        """Return a smaller variant for calibration on noise, since widths do not depend on the resolution."""
        return self


class Adapter(Protocol):
    """The build side's access to a stock diffusers module."""

    stock: type[nn.Module]
    """The diffusers class; its arguments are the entries of a checkpoint's configuration."""

    token_routers: ClassVar[TokenRouters]
    """Constructors of token routers by kind, in the order of ``Preset.token_routers``."""

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Make a stock module with torch's default initialization; blocks that share an embedder share one module."""

    def initialize(self, backbone: Any) -> None:
        """Overwrite the weights with the published initialization for training from scratch."""

    def share_embedders(self, backbone: Any) -> None:
        """Make embedders that blocks share one module. Raises ``CheckpointError`` if their copies differ."""

    def run(self, backbone: Any, inputs: Inputs) -> Tensor:
        """Return the stock module's output, shaped as its latents or with more channels: (B, ...)."""

    def blocks(self, backbone: Any) -> list[nn.Module]:
        """Return the blocks that have gates, in order of execution."""

    def attach(self, block: Any, gates: BlockGates) -> None:
        """Hook a block's gates into the stock block. Each gate multiplies, so slicing at a gate is exact."""

    def lora_targets(self, block: Any) -> tuple[str, ...]:
        """Return the names of a block's attention and MLP linears, which TD-LoRA updates."""

    def timestep_embedding(self, backbone: Any, timestep: Tensor) -> Tensor:
        """Return the input of the width routers, a function of t alone: (B,) -> (B, C)."""

    def permute_units(self, backbone: Any, block: int, heads: Tensor, groups: Tensor) -> None:
        """Reorder heads (H,) and MLP groups (G,) of a block in place; the function computed is unchanged."""


class Conditioning(Protocol):
    """Conditions of a backbone: class labels or embedded prompts."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """Tensors of data files other than latents."""

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        """Make random conditions for ``count`` samples of noise."""

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        """Drop the conditions of the rows (B,) that are True, as training for classifier-free guidance needs."""

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        """Return all arguments of the stock module."""


class Slicer(Protocol):
    """The functions of ``cut``."""

    def slice_network(self, context: SliceContext, segment: Segment) -> Slice:
        """Cut the network that runs at each step of a segment."""

    def slice_conditioning(self, context: SliceContext) -> Slice:
        """Cut the conditioning network, run once for all steps: t and conditions to ``modulation`` (rows, M)."""

    def tables(self, config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the constants of the network that no checkpoint stores."""


class PromptConditioning(Conditioning, Protocol):
    """Conditions that are embedded prompts."""

    unconditional: ClassVar[str | None]
    """Prompt of the unconditional prediction of classifier-free guidance; None where there is none."""

    def embed(self, pipe: Any, prompts: list[str]) -> Conditions:
        """Embed prompts with the text encoders of the model's diffusers pipeline, one row per prompt."""


class EngineSizes(Protocol):
    """The functions of ``engine_sizes``. Imports no torch."""

    def free_sizes(self, spec: ModelSpec, segment: Segment | None) -> dict[str, Profile]:
        """Return the range of each free dimension next to ``batch`` and ``rows``, by its symbol in the graphs.

        ``segment`` is None for the conditioning network and the dense network.
        """

    def sorts_text(self, spec: ModelSpec, block: int) -> bool:
        """Return True if a block's top-k sorts its text tokens together with the tokens that a router may skip."""
