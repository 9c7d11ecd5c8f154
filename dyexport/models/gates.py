"""Gates that multiply activations by the decisions of routers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dyexport.models.routers import BlockRouter

GATE_TEMPERATURE = 5.0  # tau of the Gumbel-sigmoid, arXiv 2410.03456 section 3.4

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
