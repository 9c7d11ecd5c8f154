"""The masked model: a stock backbone, plus routers whose gates multiply its activations.

It is the reference that every slim, exported or compiled network is tested against. Gates attach to the
unmodified diffusers module through forward hooks, so with every gate open it *is* that module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import Adapter, Inputs, RouterKind
from dyexport.bundle.spec import TokenRouterKind
from dyexport.bundle.tables import WidthTable
from dyexport.lora import LoraSpec
from dyexport.models.budgets import budget_shares
from dyexport.models.checkpointing import BlockCheckpoints, GatedBlock
from dyexport.models.gates import BlockGates, GatedPass, GateNoise, hard_gate
from dyexport.models.hooks import BIAS
from dyexport.models.routers import BlockRouter, without_autocast
from dyexport.models.td_lora import TdLora

MEAN_POINTS = 64  # timesteps that gates are averaged over


class DynamicOutput(NamedTuple):
    """``sample`` and the gates it was computed with.

    Gates are hard, {0, 1}, and carry straight-through gradients. They are free of training noise, so that a
    FLOPs penalty on them counts what inference will run.
    """

    sample: (
        Tensor  # of the stock module's shape: (B, C_out, H, W), with frames (B, C_out, F, H, W), packed (B, N, C_out)
    )
    heads: Tensor  # (B, L, H)
    groups: Tensor  # (B, L, G)
    tokens: Tensor  # (B, L, N)
    token_logits: Tensor  # (B, L, N); +inf where there is no token router


class DynamicTransformer(nn.Module):
    """A stock diffusers transformer with timestep-wise widths and spatial-wise tokens.

    ``groups`` MLP groups per block default to the number of heads, as published. With ``tokens``
    False there is no token router and every token runs. ``token_router`` is their kind; None: the kind of
    new models. With ``router`` 'ordered' the units that are
    on at a timestep are always the first of their block. With 'static' they are the same at every timestep, and there
    is no token router: the model is one slim network. ``table``, if set, replaces the width
    routers' decisions: a model calibrated without training has no trained routers. With ``td_lora`` the
    backbone is frozen, except its biases if ``td_lora.bias`` is 'all', and low-rank updates that follow the
    timestep are trained instead.
    ``budgets``, if any, are the FLOPs budgets, ascending, that one model is trained for; ``budget`` is the one whose
    gates apply.
    ``order``, if set, is the place of every unit before ranking: ``heads`` (L, H), ``groups`` (L, G).
    """

    table: WidthTable | None = None
    budget: float | None = None
    order: Mapping[str, Tensor] | None = None

    def __init__(
        self,
        backbone: nn.Module,
        adapter: Adapter,
        *,
        heads: int,
        groups: int | None = None,
        tokens: bool = True,
        router: RouterKind = "free",
        td_lora: LoraSpec | None = None,
        token_router: TokenRouterKind | None = None,
        budgets: Sequence[float] = (),
    ) -> None:
        super().__init__()
        adapter.share_embedders(backbone)
        self.backbone = backbone
        self.adapter = adapter
        self.heads = heads
        self.groups = groups or heads
        self.router = router
        self.budgets = tuple(budgets)
        blocks = adapter.blocks(backbone)
        channels = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        routed = tokens and router != "static"
        self.token_router = (token_router or [*adapter.token_routers][-1]) if routed else None
        make_tokens = None if self.token_router is None else adapter.token_routers[self.token_router]
        self.routers = nn.ModuleList(
            BlockRouter(
                channels=channels,
                heads=heads,
                groups=self.groups,
                token_router=make_tokens,
                kind=router,
                budgets=len(self.budgets),
            )
            for _ in blocks
        )
        self._gates = [BlockGates(router, index) for index, router in enumerate(self.block_routers)]
        for block, gates in zip(blocks, self._gates, strict=True):
            adapter.attach(block, gates)
        self.td_lora = None if td_lora is None else self._new_lora(blocks, channels, td_lora)

    def _new_lora(self, blocks: list[nn.Module], channels: int, spec: LoraSpec) -> TdLora:
        for name, value in self.backbone.named_parameters():
            value.requires_grad_(spec.bias == "all" and name.endswith(BIAS))
        return TdLora([self.lora_linears(block) for block in blocks], channels, spec)

    def lora_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Return the linears of a stock block that TD-LoRA updates, by name."""
        return {name: cast(nn.Linear, block.get_submodule(name)) for name in self.adapter.lora_targets(block)}

    def lora_gates(self, timestep: Tensor) -> Tensor:
        """Compute the gates of every block's experts: (B,) -> (B, L, E)."""
        assert self.td_lora is not None
        return self.td_lora.gates_at(self._timestep_embedding(timestep))

    @torch.no_grad()
    def mean_lora_gates(self, start: float, end: float) -> Tensor:
        """Average the experts' gates over an interval of t, every t being equally likely: (L, E)."""
        share = (torch.arange(MEAN_POINTS, device=self.device) + 0.5) / MEAN_POINTS
        return self.lora_gates(start + share * (end - start)).mean(dim=0)

    def merge_lora(self) -> None:
        """Add a plain LoRA, whose one expert is the same at every t, to the weights of the backbone."""
        assert self.td_lora is not None
        assert self.td_lora.spec.experts == 1
        for block, lora in zip(self.adapter.blocks(self.backbone), self.td_lora.block_loras, strict=True):
            lora.merge(self.lora_linears(block))
        self.td_lora = None

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters that fine-tuning changes, without the routers."""
        modules = [self.backbone] if self.td_lora is None else [self.backbone, self.td_lora]
        return [value for module in modules for value in module.parameters() if value.requires_grad]

    def parts(self) -> dict[str, nn.Module]:
        """Return the modules next to the backbone, by attribute."""
        parts = {"routers": self.routers, "td_lora": self.td_lora}
        return {name: module for name, module in parts.items() if module is not None}

    def all_weights(self) -> dict[str, Tensor]:
        """Return the weights of backbone, routers and TD-LoRA by the names that slices read."""
        parts = {f"{part}.{name}": value for part, m in self.parts().items() for name, value in m.state_dict().items()}
        return {**self.backbone.state_dict(), **parts}

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
        """Device of the computation. Streamed weights, which are not routers' biases, are on the meta device."""
        devices = (value.device for value in self.parameters() if not value.is_meta)
        return next(devices, torch.device("cpu"))

    def _timestep_embedding(self, timestep: Tensor) -> Tensor:
        """Compute the input of width routers: (B,) -> (B, C)."""
        with without_autocast(timestep.device):
            return self.adapter.timestep_embedding(self.backbone, timestep)

    def width_logits(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Compute router logits in fp32: (B,) -> (B, L, H), (B, L, G). Unit 0 has +inf: it is always on."""
        embedding = self._timestep_embedding(timestep).float()  # (B, C)
        shares = self._budget_shares()
        logits = [router.width_logits(embedding, shares) for router in self.block_routers]
        heads, groups = (torch.stack(values, dim=1) for values in zip(*logits, strict=True))
        return F.pad(heads, (1, 0), value=torch.inf), F.pad(groups, (1, 0), value=torch.inf)

    def _budget_shares(self) -> Tensor | None:
        if not self.budgets:
            return None
        assert self.budget is not None, "a model of several budgets runs at one of them"
        return budget_shares(self.budgets, self.budget).to(self.device)

    def fix_budget(self, budget: float) -> None:
        """Keep the routers of one budget; one between two of ``budgets`` gets logits between theirs."""
        for router in self.block_routers:
            router.fix_budget(budget_shares(self.budgets, budget).to(self.device))
        self.budgets, self.budget = (), None

    def width_gates(self, timestep: Tensor, noise: GateNoise | None = None) -> tuple[Tensor, Tensor]:
        """Compute hard head and group gates: (B,) -> (B, L, H), (B, L, G)."""
        if self.table is not None:
            return self._table_gates(self.table, timestep)
        if noise is not None and self.router == "ordered":
            noise = _shared_noise(noise)
        heads, groups = self.width_logits(timestep)
        return _force_first(hard_gate(heads[..., 1:], noise)), _force_first(hard_gate(groups[..., 1:], noise))

    @staticmethod
    def _table_gates(table: WidthTable, timestep: Tensor) -> tuple[Tensor, Tensor]:
        rows = [table.row(float(t)) for t in timestep]
        heads = torch.from_numpy(table.heads[rows]).to(timestep.device, torch.float32)  # (B, L, H)
        groups = torch.from_numpy(table.groups[rows]).to(timestep.device, torch.float32)  # (B, L, G)
        return heads, groups

    def forward(self, inputs: Inputs, *, noise: GateNoise | None = None) -> DynamicOutput:
        """Run the model with routed gates; ``inputs`` are those of the stock module."""
        heads, groups = self.width_gates(inputs["timestep"])
        masks = (heads, groups) if noise is None else self.width_gates(inputs["timestep"], noise)
        run = GatedPass(head_masks=masks[0], group_masks=masks[1], noise=noise, budget_shares=self._budget_shares())
        with self._following(run):
            sample = self.forward_dense(inputs)
        tokens = torch.stack(run.tokens, dim=1)  # (B, L, N)
        return DynamicOutput(sample, heads, groups, tokens, torch.stack(run.token_logits, dim=1))

    def forward_masked(self, inputs: Inputs, *, heads: Tensor, groups: Tensor) -> Tensor:
        """Run the model with width masks (B, L, H), (B, L, G) and every token."""
        with self.gated(heads=heads, groups=groups):
            return self.forward_dense(inputs)

    def gated(self, *, heads: Tensor, groups: Tensor) -> AbstractContextManager[None]:
        """Apply width masks (B, L, H), (B, L, G) to ``forward_dense`` inside the context; every token runs."""
        return self._following(GatedPass(head_masks=heads, group_masks=groups, noise=None, route_tokens=False))

    def forward_dense(self, inputs: Inputs) -> Tensor:
        """Run the dense model: every head, group and token (arXiv 2410.03456 section 3.5)."""
        if self.td_lora is None:
            return self.adapter.run(self.backbone, inputs)
        self.td_lora.follow(self.lora_gates(inputs["timestep"]))
        try:
            return self.adapter.run(self.backbone, inputs)
        finally:
            self.td_lora.follow(None)

    def checkpoint_blocks(self) -> None:
        """Keep the inputs of blocks for a backward pass, which recomputes the rest (gradient checkpointing).

        Blocks of a streamed model are recomputed to their end, since a layer's weights are freed after it.
        """
        blocks = self.adapter.blocks(self.backbone)
        loras = [None] * len(blocks) if self.td_lora is None else self.td_lora.block_loras
        gated = [GatedBlock(*parts) for parts in zip(blocks, self._gates, loras, strict=True)]
        streamed = next(self.backbone.parameters()).is_meta
        cast(Any, self.backbone).enable_gradient_checkpointing(BlockCheckpoints(gated, stop_early=not streamed))

    @contextmanager
    def _following(self, run: GatedPass) -> Iterator[None]:
        self._follow(run)
        try:
            yield
        finally:
            self._follow(None)

    def _follow(self, run: GatedPass | None) -> None:
        for gates in self._gates:
            gates.open(run)


def _shared_noise(noise: GateNoise) -> GateNoise:
    """Sample one value for all units of a block, which share a score: the first ones stay on under noise."""
    return lambda shape: noise(torch.Size((*shape[:-1], 1)))


def _force_first(gates: Tensor) -> Tensor:
    return F.pad(gates, (1, 0), value=1.0)
