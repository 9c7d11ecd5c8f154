"""Routers that decide per timestep and per token, and gates that multiply activations by their decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import RouterKind
from dyexport.bundle.spec import TokenRouterKind
from dyexport.models.budgets import BudgetOffsets

GATE_TEMPERATURE = 5.0  # tau of the Gumbel-sigmoid, arXiv 2410.03456 section 3.4
WIDTH_BIAS = 15.0  # everything starts on, so fine-tuning starts from the static model
TOKEN_BIAS = 35.0
THRESHOLD_SPAN = 10.0  # of new ordered routers: two gate temperatures, so that units close one by one

GateNoise = Callable[[torch.Size], Tensor]
"""Samples logistic noise of a shape, for training; None at evaluation."""


def hard_gate(logits: Tensor, noise: GateNoise | None = None) -> Tensor:
    """Return 1 where the logit is positive, else 0, with the gradient of sigmoid((logit + noise) / tau).

    Gumbel-sigmoid with a hard straight-through estimator (section 3.4): the difference of two Gumbel
    variables is logistic. Decided in fp32 at every precision of the network.
    """
    logits = logits.float()
    if noise is not None:
        logits = logits + noise(logits.shape)
    soft = torch.sigmoid(logits / GATE_TEMPERATURE)
    return (logits > 0).float() - soft.detach() + soft


def fp32_linear(linear: nn.Linear, value: Tensor) -> Tensor:
    """Run a router's linear layer in fp32, even under autocast: a rounded logit would change decisions."""
    with without_autocast(value.device):
        return F.linear(value.float(), linear.weight.float(), linear.bias.float())


def without_autocast(device: torch.device) -> torch.autocast:
    """Turn autocast off inside the context."""
    return torch.autocast(device.type, enabled=False)


class Fp32Linear(nn.Linear):
    """A large layer of a router. It is called as a module, so that streaming can load its weights just in time."""

    def forward(self, value: Tensor) -> Tensor:
        return fp32_linear(self, value)


class TokenRouter(nn.Module, ABC):
    """Router that decides for every token of a block whether its MLP runs (SDT, section 3.3), in fp32.

    A backbone chooses its inputs. Its last layer is a ``Linear`` to one logit.
    """

    @property
    @abstractmethod
    def last(self) -> nn.Linear:
        """The layer that computes the logits."""

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute logits (B, N) of the tokens (B, N, C) that come first among ``inputs``."""


TokenRouters = Mapping[TokenRouterKind, Callable[[int], TokenRouter]]
"""Constructors of a block's token router from its channels C, with torch's default initialization, by kind."""


class WidthRouter(nn.Module, ABC):
    """Router that decides which units of a block are on, in fp32. Unit 0 is always on and has no logit.

    ``bias`` is added to the logits.
    """

    bias: nn.Parameter

    @abstractmethod
    def forward(self, embedding: Tensor) -> Tensor:
        """Compute logits of the units after the first from the timestep embedding: (B, C) -> (B, U - 1)."""

    @abstractmethod
    def open(self) -> None:
        """Initialize with every gate on for every input."""

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add a constant to the logits."""
        self.bias.add_(amount)


class StaticRouter(WidthRouter):
    """One learned logit for each unit, the same at every t. Not in the paper."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(units - 1))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.bias.float().expand(len(embedding), -1)  # (B, U - 1)

    @torch.no_grad()
    def open(self) -> None:
        nn.init.constant_(self.bias, WIDTH_BIAS)


class DynamicRouter(nn.Linear, WidthRouter):
    """Router that decides from the timestep embedding (TDW, section 3.2)."""

    @torch.no_grad()
    def open(self) -> None:
        """Initialize as published: every gate on for every input."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, WIDTH_BIAS)


class FreeRouter(DynamicRouter):
    """One logit for each unit, as published."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__(channels, units - 1)

    def forward(self, embedding: Tensor) -> Tensor:
        return fp32_linear(self, embedding)


class OrderedRouter(DynamicRouter):
    """One score and one ascending threshold per unit: at every t the units that are on come first.

    The units of a segment are then a prefix of the widest segment's, and engines share one copy of the weights.
    Not in the paper.
    """

    def __init__(self, channels: int, units: int) -> None:
        super().__init__(channels, 1)
        self.increments = nn.Parameter(torch.empty(units - 1))  # between thresholds, before softplus

    def forward(self, embedding: Tensor) -> Tensor:
        steps = F.softplus(self.increments.float())  # (U - 1,)
        thresholds = steps.cumsum(0) / len(steps)  # a mean, so that the last moves no faster than the score in training
        return fp32_linear(self, embedding) - thresholds  # (B, U - 1)

    @torch.no_grad()
    def spread(self, span: float) -> None:
        """Space the thresholds evenly, the last at ``span``."""
        nn.init.constant_(self.increments, math.log(math.expm1(span)))

    @torch.no_grad()
    def open(self) -> None:
        super().open()
        self.spread(THRESHOLD_SPAN)
        self.shift(THRESHOLD_SPAN)


WIDTH_ROUTERS: Mapping[RouterKind, type[FreeRouter | OrderedRouter | StaticRouter]] = {
    "free": FreeRouter,
    "ordered": OrderedRouter,
    "static": StaticRouter,
}


class BlockRouter(nn.Module):
    """Routers of one block: two for its widths (TDW), one on every token (SDT).

    ``budgets`` is the number of FLOPs budgets that have offsets of their logits; 0 for a model of one budget.
    """

    def __init__(
        self,
        *,
        channels: int,
        heads: int,
        groups: int,
        token_router: Callable[[int], TokenRouter] | None,
        kind: RouterKind = "free",
        budgets: int = 0,
    ) -> None:
        super().__init__()
        self.heads: WidthRouter = WIDTH_ROUTERS[kind](channels, heads)
        self.groups: WidthRouter = WIDTH_ROUTERS[kind](channels, groups)
        self.tokens = token_router(channels) if token_router is not None else None
        self.offsets: BudgetOffsets | None = None
        if budgets:
            sizes = {"heads": len(self.heads.bias), "groups": len(self.groups.bias)}
            self.offsets = BudgetOffsets(budgets, **sizes, tokens=self.tokens is not None)
        self.open()

    @torch.no_grad()
    def open(self) -> None:
        """Initialize as published: every gate on for every input."""
        self.heads.open()
        self.groups.open()
        if self.tokens is not None:
            nn.init.constant_(self.tokens.last.bias, TOKEN_BIAS)

    def width_logits(self, embedding: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute logits from the timestep embedding (B, C): (B, H - 1), (B, G - 1).

        ``shares`` are those of ``budget_shares``; None for a model of one budget.
        """
        heads, groups = self.heads(embedding), self.groups(embedding)
        if self.offsets is None:
            return heads, groups
        assert shares is not None
        return heads + shares @ self.offsets.heads.float(), groups + shares @ self.offsets.groups.float()

    def token_logits(self, inputs: Sequence[Tensor], shares: Tensor | None) -> Tensor:
        """Compute logits of the tokens (R, N, C) that come first among ``inputs``: (R, N)."""
        assert self.tokens is not None
        logits: Tensor = self.tokens(*inputs)
        if self.offsets is None:
            return logits
        assert shares is not None
        assert self.offsets.tokens is not None
        return logits + shares @ self.offsets.tokens.float()

    @torch.no_grad()
    def fix_budget(self, shares: Tensor) -> None:
        """Add the offsets at one budget to the biases, and drop them."""
        if self.offsets is None:
            return
        self.heads.bias.add_(shares @ self.offsets.heads)
        self.groups.bias.add_(shares @ self.offsets.groups)
        if self.tokens is not None and self.offsets.tokens is not None:
            self.tokens.last.bias.add_(shares @ self.offsets.tokens)
        self.offsets = None

    def run_all_tokens(self) -> None:
        """Keep every token, overwriting what was trained."""
        if self.tokens is not None:
            nn.init.zeros_(self.tokens.last.weight)
            nn.init.constant_(self.tokens.last.bias, TOKEN_BIAS)

    @torch.no_grad()
    def shift(self, amount: float, *, tokens: bool) -> None:
        """Add a constant to the logits, with ``tokens`` also to the token router's. A positive amount keeps more."""
        self.heads.shift(amount)
        self.groups.shift(amount)
        if tokens and self.tokens is not None:
            self.tokens.last.bias.add_(amount)


@dataclass
class GatedPass:
    """Gates of one forward pass: blocks read the masks and append their token gates.

    Tokens are in the order of the block's input.
    """

    head_masks: Tensor  # (B, L, H), with training noise
    group_masks: Tensor  # (B, L, G)
    noise: GateNoise | None
    route_tokens: bool = True
    budget_shares: Tensor | None = None  # (B,) of B budgets
    tokens: list[Tensor] = field(default_factory=list)  # L x (B, N), without noise
    token_logits: list[Tensor] = field(default_factory=list)
    sampled: dict[int, Tensor] = field(default_factory=dict)  # noise of each block's token gates

    @property
    def batch(self) -> int:
        return len(self.head_masks)

    def again(self) -> GatedPass:
        """Return a pass for recomputation: with the same masks and noise, and without recorded tokens."""
        return replace(self, tokens=[], token_logits=[])

    def noise_of(self, block: int) -> GateNoise | None:
        """Return the noise of a block's token gates, which is sampled once and then kept; None without noise."""
        return None if self.noise is None else partial(self._sample_once, self.noise, block)

    def _sample_once(self, noise: GateNoise, block: int, shape: torch.Size) -> Tensor:
        if block not in self.sampled:
            self.sampled[block] = noise(shape)
        return self.sampled[block]


class BlockGates:
    """Gates of one block, which an adapter hooks into the stock block.

    Every method takes and returns activations, and changes nothing outside a gated pass. A hook calls
    ``route`` once per pass, before ``tokens``. A block may see one sample as several consecutive rows,
    such as the frames of a video: R is then a multiple of B.
    """

    def __init__(self, router: BlockRouter, index: int) -> None:
        self.router = router
        self.index = index
        self._pass: GatedPass | None = None
        self._token_mask: Tensor | None = None  # (R, N)

    @property
    def current(self) -> GatedPass | None:
        """The pass whose gates apply."""
        return self._pass

    def open(self, run: GatedPass | None) -> None:
        """Set the pass whose gates to apply; None for no gates."""
        self._pass = run
        self._token_mask = None

    def heads(self, activations: Tensor) -> Tensor:
        """Multiply each head's channels by its gate: (R, N, H * D) -> (R, N, H * D)."""
        if self._pass is None:
            return activations
        return _mask_units(activations, self._pass.head_masks[:, self.index])

    def groups(self, activations: Tensor) -> Tensor:
        """Multiply each MLP group's channels by its gate, before GELU, GELU(0) being 0: (R, N, G * S)."""
        if self._pass is None:
            return activations
        return _mask_units(activations, self._pass.group_masks[:, self.index])

    def route(self, *inputs: Tensor) -> None:
        """Decide which tokens run from the token router's inputs, the tokens (R, N, C) first."""
        if self._pass is None or not self._pass.route_tokens:
            return
        if self.router.tokens is None:
            logits = torch.full(inputs[0].shape[:2], torch.inf, device=inputs[0].device)  # (R, N)
            gates = torch.ones_like(logits)
        else:
            logits = self.router.token_logits(inputs, self._pass.budget_shares)  # (R, N)
            gates = hard_gate(logits)
            noise = self._pass.noise_of(self.index)
            self._token_mask = gates if noise is None else hard_gate(logits, noise)
        self._pass.tokens.append(gates.reshape(self._pass.batch, -1))
        self._pass.token_logits.append(logits.reshape(self._pass.batch, -1))

    def tokens(self, update: Tensor) -> Tensor:
        """Multiply a residual update by the token gates; tokens before the last N always run: (R, M, C), M >= N."""
        if self._token_mask is None:
            return update
        always = update.shape[1] - self._token_mask.shape[1]
        mask = F.pad(self._token_mask, (always, 0), value=1.0) if always else self._token_mask  # (R, M)
        return update * mask[..., None].to(update.dtype)  # (R, M, C)


def _mask_units(activations: Tensor, mask: Tensor) -> Tensor:
    """Multiply contiguous channel units by their gates: (R, N, U * size), (B, U) -> (R, N, U * size)."""
    samples, units = mask.shape
    sized = activations.reshape(samples, -1, units, activations.shape[-1] // units)  # (B, R / B * N, U, size)
    return (sized * mask[:, None, :, None].to(activations.dtype)).view(activations.shape)
