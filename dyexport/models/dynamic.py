"""The masked model: a stock backbone, plus routers whose gates multiply its activations.

This is the truth that every slim, exported or compiled form is tested against. Gates attach to the
unmodified diffusers module through forward hooks, so with every gate open it *is* that module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.models.base import BackboneAdapter, BlockSites
from dyexport.tables import WidthTable

GATE_TEMPERATURE = 5.0  # tau of the Gumbel-sigmoid, arXiv 2410.03456 section 3.4
WIDTH_BIAS = 15.0  # everything starts on, so fine-tuning starts from the static model
TOKEN_BIAS = 35.0

GateNoise = Callable[[torch.Size], Tensor]
"""Draws logistic noise of a shape, for training; absent at evaluation."""


class DynamicOutput(NamedTuple):
    """``sample`` and the gates it was computed with.

    Gates are hard, {0, 1}, and carry straight-through gradients. They are the ones evaluation would
    use, free of training noise, so that a FLOPs penalty on them prices what will be run.
    """

    sample: Tensor  # (B, C_out, H, W)
    heads: Tensor  # (B, L, H)
    groups: Tensor  # (B, L, G)
    tokens: Tensor  # (B, L, N)
    token_logits: Tensor  # (B, L, N); +inf where there is no token router


def hard_gate(logits: Tensor, noise: GateNoise | None = None) -> Tensor:
    """1 where the logit is positive, with the gradient of sigmoid((logit + noise) / tau).

    Gumbel-sigmoid with a hard straight-through estimator (section 3.4): the difference of two Gumbel
    variables is logistic. Decided in fp32, whatever the network's precision.
    """
    logits = logits.float()
    if noise is not None:
        logits = logits + noise(logits.shape)
    soft = torch.sigmoid(logits / GATE_TEMPERATURE)
    return (logits > 0).float() - soft.detach() + soft


class TokenRouter(nn.Module):
    """Linear -> ReLU -> Linear on every token, in fp32 (SDT, section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 1)
        self.inner = nn.Linear(channels, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, residual: Tensor) -> Tensor:
        """(B, N, C) -> logits (B, N)."""
        return _fp32_linear(self.outer, F.relu(_fp32_linear(self.inner, residual))).squeeze(-1)


class BlockRouter(nn.Module):
    """Routers of one block: two on the timestep embedding (TDW), one on every token (SDT)."""

    def __init__(self, *, channels: int, heads: int, groups: int, tokens: bool) -> None:
        super().__init__()
        self.heads = nn.Linear(channels, heads - 1)
        self.groups = nn.Linear(channels, groups - 1)
        self.tokens = TokenRouter(channels) if tokens else None
        self.open()

    @torch.no_grad()
    def open(self) -> None:
        """Initialise as published: every gate on, whatever the input."""
        for router in (self.heads, self.groups):
            nn.init.trunc_normal_(router.weight, std=0.02)
            nn.init.constant_(router.bias, WIDTH_BIAS)
        if self.tokens is not None:
            nn.init.constant_(self.tokens.outer.bias, TOKEN_BIAS)

    @torch.no_grad()
    def shift(self, amount: float, *, tokens: bool) -> None:
        """Add a constant to the logits, of the token router too if ``tokens``: more of each for a positive amount."""
        self.heads.bias.add_(amount)
        self.groups.bias.add_(amount)
        if tokens and self.tokens is not None:
            self.tokens.outer.bias.add_(amount)


@dataclass
class _Pass:
    """Gates of the forward pass under way; hooks read the masks and append what tokens did."""

    head_masks: Tensor  # (B, L, H), as multiplied, noise included
    group_masks: Tensor  # (B, L, G)
    noise: GateNoise | None
    route_tokens: bool = True
    token_mask: Tensor | None = None  # (B, N) of the block under way
    tokens: list[Tensor] = field(default_factory=list)  # L x (B, N), free of noise
    token_logits: list[Tensor] = field(default_factory=list)


class DynamicTransformer(nn.Module):
    """A stock diffusers transformer with timestep-wise widths and spatial-wise tokens.

    ``groups`` MLP groups per block default to the number of heads, as published. With ``tokens``
    False there is no token router and every token runs. ``table``, where set, replaces the width
    routers' decisions (a model calibrated without training has no trained routers).
    """

    table: WidthTable | None = None

    def __init__(
        self,
        backbone: nn.Module,
        adapter: BackboneAdapter,
        *,
        heads: int,
        groups: int | None = None,
        tokens: bool = True,
    ) -> None:
        super().__init__()
        adapter.share_embedders(backbone)
        self.backbone = backbone
        self.adapter = adapter
        self.heads = heads
        self.groups = groups or heads
        sites = adapter.sites(backbone)
        channels = sites[0].attention_out.out_features
        self.routers = nn.ModuleList(
            BlockRouter(channels=channels, heads=heads, groups=self.groups, tokens=tokens) for _ in sites
        )
        self._pass: _Pass | None = None
        for index, block in enumerate(sites):
            self._attach(index, block)

    @property
    def block_routers(self) -> list[BlockRouter]:
        return cast(list[BlockRouter], list(self.routers))

    @property
    def depth(self) -> int:
        return len(self.routers)

    @property
    def has_token_routers(self) -> bool:
        return self.block_routers[0].tokens is not None

    @property
    def config(self) -> Any:
        """The stock module's configuration, for pipelines."""
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def width_logits(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits in fp32: (B,) -> (B, L, H), (B, L, G). Unit 0 has +inf: it is always on."""
        embedding = self.adapter.timestep_embedding(self.backbone, timestep).float()  # (B, C)
        heads = torch.stack([_fp32_linear(router.heads, embedding) for router in self.block_routers], dim=1)
        groups = torch.stack([_fp32_linear(router.groups, embedding) for router in self.block_routers], dim=1)
        return F.pad(heads, (1, 0), value=torch.inf), F.pad(groups, (1, 0), value=torch.inf)

    def width_gates(self, timestep: Tensor, noise: GateNoise | None = None) -> tuple[Tensor, Tensor]:
        """Hard head and group gates: (B,) -> (B, L, H), (B, L, G)."""
        if self.table is not None:
            return self._table_gates(self.table, timestep)
        heads, groups = self.width_logits(timestep)
        return _force_first(hard_gate(heads[..., 1:], noise)), _force_first(hard_gate(groups[..., 1:], noise))

    @staticmethod
    def _table_gates(table: WidthTable, timestep: Tensor) -> tuple[Tensor, Tensor]:
        rows = [table.row(float(t)) for t in timestep]
        heads = torch.from_numpy(table.heads[rows]).to(timestep.device, torch.float32)  # (B, L, H)
        groups = torch.from_numpy(table.groups[rows]).to(timestep.device, torch.float32)  # (B, L, G)
        return heads, groups

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        *,
        noise: GateNoise | None = None,
    ) -> DynamicOutput:
        """Denoise with routed gates: latents (B, C, H, W), timestep (B,), labels (B,)."""
        heads, groups = self.width_gates(timestep)
        masks = (heads, groups) if noise is None else self.width_gates(timestep, noise)
        run = _Pass(head_masks=masks[0], group_masks=masks[1], noise=noise)
        sample = self._run(run, hidden_states, timestep, class_labels)
        tokens = torch.stack(run.tokens, dim=1)  # (B, L, N)
        return DynamicOutput(sample, heads, groups, tokens, torch.stack(run.token_logits, dim=1))

    def masked(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, *, heads: Tensor, groups: Tensor
    ) -> Tensor:
        """Denoise with given width masks (B, L, H), (B, L, G) and every token: (B, C_out, H, W)."""
        run = _Pass(head_masks=heads, group_masks=groups, noise=None, route_tokens=False)
        return self._run(run, hidden_states, timestep, class_labels)

    def _run(self, run: _Pass, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        self._pass = run
        try:
            return self.complete(hidden_states, timestep, class_labels)
        finally:
            self._pass = None

    def complete(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """The complete model, every gate open: (B, C_out, H, W) (section 3.5)."""
        sample: Tensor = self.backbone(hidden_states, timestep=timestep, class_labels=class_labels).sample
        return sample

    def _attach(self, index: int, sites: BlockSites) -> None:
        sites.attention_out.register_forward_pre_hook(partial(self._mask_heads, index))
        sites.mlp_in.register_forward_hook(partial(self._mask_groups, index))
        sites.token_input.register_forward_pre_hook(partial(self._route_tokens, index))
        sites.mlp.register_forward_hook(self._mask_tokens)

    def _mask_heads(self, index: int, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._pass is None:
            return None
        return (_mask_units(inputs[0], self._pass.head_masks[:, index]),)

    def _mask_groups(self, index: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._pass is None:
            return None
        return _mask_units(output, self._pass.group_masks[:, index])

    def _route_tokens(self, index: int, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if self._pass is None or not self._pass.route_tokens:
            return
        residual = inputs[0]  # (B, N, C)
        router = self.block_routers[index].tokens
        if router is None:
            logits = torch.full(residual.shape[:2], torch.inf, device=residual.device)  # (B, N)
            gates = torch.ones_like(logits)
            self._pass.token_mask = None
        else:
            logits = router(residual)  # (B, N)
            gates = hard_gate(logits)
            self._pass.token_mask = gates if self._pass.noise is None else hard_gate(logits, self._pass.noise)
        self._pass.tokens.append(gates)
        self._pass.token_logits.append(logits)

    def _mask_tokens(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._pass is None or self._pass.token_mask is None:
            return None
        return output * self._pass.token_mask[..., None].to(output.dtype)  # (B, N, C)


def _mask_units(activations: Tensor, mask: Tensor) -> Tensor:
    """Multiply contiguous channel units by their gates: (B, N, U * size), (B, U) -> (B, N, U * size)."""
    units = activations.unflatten(-1, (mask.shape[-1], -1))  # (B, N, U, size)
    return (units * mask[:, None, :, None].to(activations.dtype)).flatten(-2)


def _force_first(gates: Tensor) -> Tensor:
    return F.pad(gates, (1, 0), value=1.0)


def _fp32_linear(linear: nn.Linear, value: Tensor) -> Tensor:
    return F.linear(value.float(), linear.weight.float(), linear.bias.float())
