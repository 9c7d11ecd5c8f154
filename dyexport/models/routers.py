"""Routers that decide per timestep which units are on, and per token whether the MLP runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import RouterKind
from dyexport.bundle.spec import TokenRouterKind
from dyexport.models.budgets import BudgetOffsets

WIDTH_BIAS = 15.0  # everything starts on, so fine-tuning starts from the static model
TOKEN_BIAS = 35.0
THRESHOLD_SPAN = 10.0  # of new ordered routers: two gate temperatures, so that units close one by one


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
