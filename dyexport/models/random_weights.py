"""A dynamic model with random weights, for timing at real size when there is no checkpoint.

Its samples are noise. Its shapes, FLOPs and gate patterns are those of a real model: routers are linear in the
timestep embedding E_t, so random routers would switch units at random t. Instead, router weights are fitted by
ridge regression such that their logits follow slow cosine waves of t.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset, RouterKind
from dyexport.bundle.spec import TokenRouterKind
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.routers import DynamicRouter, OrderedRouter, StaticRouter, WidthRouter
from dyexport.models.td_lora import TdLora

TREND = 0.5  # amplitude of the first wave, which all units share: widths grow towards one end of the trajectory
SPREAD = 0.1  # std of the amplitudes of each unit's own waves
WAVES = 3
OFFSET = 1.5  # mean logit of the unit that is on longest; the mean logits of a block fall from here to its negative
FIT_POINTS = 2048
RIDGE = 1e-4  # of the mean variance of the embedding's channels
KEPT_TOKENS = 0.85  # mean share of tokens that a random token router keeps
LORA_SHARE = 0.3  # bound of a random TD-LoRA's B: for normed inputs, about the size of the update
LORA_TREND = 1.0  # std of the amplitudes of the waves in the logits of its experts


class SlowWaves(NamedTuple):
    """Linear functions of the timestep embedding that follow cos(pi k s) of s, the share of the range of t, in [0, 1].

    ``directions @ (E_t - center)`` is the value of the K waves at t.
    """

    center: Tensor  # (C,)
    directions: Tensor  # (K, C)

    @classmethod
    def fit(cls, model: DynamicTransformer, preset: Preset) -> Self:
        """Fit the waves by ridge regression on embeddings of the whole range of t."""
        start, end = preset.timestep_range
        share = (torch.arange(FIT_POINTS) + 0.5) / FIT_POINTS  # (T,) in (0, 1)
        embedding = model.adapter.timestep_embedding(model.backbone, start + share * (end - start)).float()  # (T, C)
        waves = torch.stack([torch.cos(torch.pi * k * share) for k in range(1, WAVES + 1)], dim=1)  # (T, K)
        center = embedding.mean(dim=0)
        inputs = (embedding - center).double()  # (T, C)
        gram = inputs.T @ inputs  # (C, C)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        directions = torch.linalg.solve(gram + ridge, inputs.T @ waves.double()).T.float()
        return cls(center, directions)

    def set_logits(self, router: nn.Linear, amplitudes: Tensor, offsets: Tensor | float = 0.0) -> None:
        """Make a router's logits ``amplitudes`` (U, K) times the waves, plus ``offsets`` (U,)."""
        router.weight.copy_(amplitudes @ self.directions)
        router.bias.copy_(offsets - router.weight @ self.center)


def random_backbone(preset: Preset, seed: int = 0) -> nn.Module:
    """Return a stock module with torch's default initialization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_adapter(preset.backbone).build(preset.transformer_config()).eval()


@torch.no_grad()
def random_dynamic(
    preset: Preset,
    *,
    tokens: bool = True,
    seed: int = 0,
    router: RouterKind = "free",
    td_lora: LoraSpec | None = None,
    token_router: TokenRouterKind | None = None,
) -> DynamicTransformer:
    """Return a dynamic model with random weights, whose widths and tokens vary with t unless they are static."""
    backbone = random_backbone(preset, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        adapter = get_adapter(preset.backbone)
        model = DynamicTransformer(
            backbone,
            adapter,
            heads=preset.heads,
            tokens=tokens,
            router=router,
            td_lora=td_lora,
            token_router=token_router,
        ).eval()
        waves = SlowWaves.fit(model, preset)
        _set_widths(model, waves)
        if model.td_lora is not None:
            _set_lora(model.td_lora, waves)
        if model.has_token_routers:
            _set_tokens(model, preset)
    return model


def _set_lora(td_lora: TdLora, waves: SlowWaves) -> None:
    """Make updates differ from zero, and let another expert dominate as t moves."""
    for block in td_lora.block_loras:
        if block.router is not None:
            waves.set_logits(block.router, LORA_TREND * torch.randn(block.router.out_features, WAVES))
    for name, value in td_lora.named_parameters():
        if name.endswith(".up"):
            value.uniform_(-LORA_SHARE, LORA_SHARE).div_(value.shape[1] ** 0.5 * td_lora.spec.scale)


def _set_widths(model: DynamicTransformer, waves: SlowWaves) -> None:
    """Make every logit the shared trend, plus the unit's own waves, plus an offset that falls from unit to unit."""
    for router in model.block_routers:
        for width in (router.heads, router.groups):
            _set_width(width, waves)


def _set_width(router: WidthRouter, waves: SlowWaves) -> None:
    if isinstance(router, StaticRouter):  # the trend differs from block to block instead
        count = len(router.bias)
        router.bias.copy_(_falling_offsets(count) + TREND * torch.randn(1) + SPREAD * torch.randn(count))
        return
    assert isinstance(router, DynamicRouter)
    amplitudes = torch.randn(router.out_features, WAVES) * SPREAD
    amplitudes[:, 0] += TREND
    if isinstance(router, OrderedRouter):
        router.spread(2 * OFFSET)
        offsets = torch.tensor([OFFSET])  # (1,)
    else:
        offsets = _falling_offsets(router.out_features)
    waves.set_logits(router, amplitudes, offsets)


def _falling_offsets(units: int) -> Tensor:
    """Return mean logits of the units after the first: (U - 1,)."""
    return torch.linspace(OFFSET, -OFFSET, units + 2)[1:-1]


def _set_tokens(model: DynamicTransformer, preset: Preset) -> None:
    """Scale each block's token logits to unit variance, with ``KEPT_TOKENS`` of them positive."""
    start, end = preset.timestep_range
    inputs = NoisedInputs(preset=preset.for_noise(), batch_size=2)
    logits = [model(inputs.at(start + share * (end - start))).token_logits for share in (0.2, 0.8)]
    stacked = torch.cat(logits)  # (B, L, N)
    for block, router in enumerate(model.block_routers):
        assert router.tokens is not None
        last = router.tokens.last
        values = stacked[:, block] - last.bias  # (B, N)
        scale = 1 / values.std()
        last.weight.mul_(scale)
        last.bias.fill_(-float(torch.quantile(values.flatten(), 1 - KEPT_TOKENS) * scale))
