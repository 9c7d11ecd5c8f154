"""A dynamic model with random weights, for timing at real size when there is no checkpoint.

Its pictures are noise; its shapes, FLOPs and gate patterns are those of a real model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset, RouterKind
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.gates import OrderedRouter
from dyexport.models.inputs import NoisedInputs
from dyexport.models.td_lora import TdLora

TREND = 0.5  # amplitude over t of what all units of a model share: wider at one end of the trajectory
SPREAD = 0.1  # std of the amplitude of each slow wave that a unit follows on its own
WAVES = 3
OFFSET = 1.5  # logit of the units that are on longest, averaged over t; of the others, down to its negative
FIT_POINTS = 2048
KEPT_TOKENS = 0.85  # share of tokens a random token router keeps, on average
LORA_SHARE = 0.3  # bound of a random TD-LoRA's B, for normed inputs about what it adds
LORA_TREND = 1.0  # std of the slow waves in the logits of its experts


def random_backbone(preset: Preset, seed: int = 0) -> nn.Module:
    """A stock module with torch's default initialisation."""
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
) -> DynamicTransformer:
    """A dynamic model with random weights and routers spread so that widths and tokens vary with t."""
    backbone = random_backbone(preset, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        adapter = get_adapter(preset.backbone)
        model = DynamicTransformer(
            backbone, adapter, heads=preset.heads, tokens=tokens, router=router, td_lora=td_lora
        ).eval()
        centre, basis = _follow_time(model, preset)
        _spread_widths(model, centre, basis)
        if model.td_lora is not None:
            _spread_lora(model.td_lora, centre, basis)
        if tokens:
            _spread_tokens(model, preset)
    return model


def _spread_lora(td_lora: TdLora, centre: Tensor, basis: Tensor) -> None:
    """Updates that are not nothing, and experts that take turns over t."""
    for block in td_lora.block_loras:
        if block.router is not None:
            block.router.weight.copy_(LORA_TREND * torch.randn(block.router.out_features, WAVES) @ basis)
            block.router.bias.copy_(-block.router.weight @ centre)
    for name, value in td_lora.named_parameters():
        if name.endswith(".up"):
            value.uniform_(-LORA_SHARE, LORA_SHARE).div_(value.shape[1] ** 0.5 * td_lora.spec.scale)


def _follow_time(model: DynamicTransformer, preset: Preset) -> tuple[Tensor, Tensor]:
    """The mean timestep embedding (C,), and directions (K, C) along which embeddings follow slow waves of t."""
    start, end = preset.timestep_range
    share = (torch.arange(FIT_POINTS) + 0.5) / FIT_POINTS  # (T,) in (0, 1)
    embedding = model.adapter.timestep_embedding(model.backbone, start + share * (end - start)).float()  # (T, C)
    waves = torch.stack([torch.cos(torch.pi * k * share) for k in range(1, WAVES + 1)], dim=1)  # (T, K)
    return embedding.mean(dim=0), _fit(embedding, waves)


def _spread_widths(model: DynamicTransformer, centre: Tensor, basis: Tensor) -> None:
    """Make every logit trend(t) + own(t) + offset, both functions smooth as those of trained routers are."""
    for router in model.block_routers:
        for linear in (router.heads, router.groups):
            own = torch.randn(linear.out_features, WAVES) * SPREAD
            own[:, 0] += TREND
            linear.weight.copy_(own @ basis)
            if isinstance(linear, OrderedRouter):
                linear.spread(2 * OFFSET)
                offsets = torch.tensor([OFFSET])  # (1,)
            else:
                offsets = torch.linspace(OFFSET, -OFFSET, linear.out_features + 2)[1:-1]  # (U - 1,)
            linear.bias.copy_(offsets - linear.weight @ centre)


def _fit(embedding: Tensor, waves: Tensor) -> Tensor:
    """Ridge regression of waves (T, K) on the centred embedding (T, C): (K, C)."""
    centred = (embedding - embedding.mean(dim=0)).double()
    gram = centred.T @ centred
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, centred.T @ waves.double()).T.float()


def _spread_tokens(model: DynamicTransformer, preset: Preset) -> None:
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
