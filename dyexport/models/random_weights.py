"""A dynamic model with random weights, for timing at real size when there is no checkpoint.

Its pictures are noise; its shapes, FLOPs and gate patterns are those of a real model.
"""

from __future__ import annotations

import torch
from torch import nn

from dyexport.models.base import get_adapter
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.presets import Preset

TREND = 0.5  # std over t of what all units of a model share: wider at one end of the trajectory
SPREAD = 0.35  # std over t of what each unit does on its own
KEPT_TOKENS = 0.85  # share of tokens a random token router keeps, on average


def random_backbone(preset: Preset, seed: int = 0) -> nn.Module:
    """A stock module with torch's default initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_adapter(preset.backbone).build(preset.transformer_config()).eval()


@torch.no_grad()
def random_dynamic(preset: Preset, *, tokens: bool = True, seed: int = 0) -> DynamicTransformer:
    """A dynamic model with random weights and routers spread so that widths and tokens vary with t."""
    backbone = random_backbone(preset, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = DynamicTransformer(backbone, get_adapter(preset.backbone), heads=preset.heads, tokens=tokens).eval()
        _spread_widths(model, preset)
        if tokens:
            _spread_tokens(model, preset)
    return model


def _spread_widths(model: DynamicTransformer, preset: Preset) -> None:
    """Make every logit trend(t) + own(t) + offset, in units of its standard deviation over t."""
    start, end = preset.timestep_range
    points = torch.linspace(start, end, 257)[:-1]
    embedding = model.adapter.timestep_embedding(model.backbone, points).float()  # (T, C)
    centre = embedding.mean(dim=0)
    _, scales, directions = torch.linalg.svd(embedding - centre, full_matrices=False)
    used = scales[:4] > 0.05 * scales[0]  # fainter directions would amplify rounding into the gates
    basis = directions[:4][used] / (scales[:4][used, None] / len(points) ** 0.5)  # (P, C): unit variance over t each
    for router in model.block_routers:
        for linear in (router.heads, router.groups):
            own = torch.randn(linear.out_features, len(basis)) * SPREAD / len(basis) ** 0.5
            own[:, 0] += TREND
            linear.weight.copy_(own @ basis)
            offsets = torch.linspace(1.5, -1.5, linear.out_features + 2)[1:-1]
            linear.bias.copy_(offsets - linear.weight @ centre)


def _spread_tokens(model: DynamicTransformer, preset: Preset) -> None:
    """Scale each block's token logits to unit variance, with ``KEPT_TOKENS`` of them positive."""
    start, end = preset.timestep_range
    inputs = NoisedInputs(preset=preset, batch_size=2)
    logits = [model(**inputs.at(start + share * (end - start)).arguments()).token_logits for share in (0.2, 0.8)]
    stacked = torch.cat(logits)  # (B, L, N)
    for block, router in enumerate(model.block_routers):
        assert router.tokens is not None
        last = router.tokens.outer
        values = stacked[:, block] - last.bias  # (B, N)
        scale = 1 / values.std()
        last.weight.mul_(scale)
        last.bias.fill_(-float(torch.quantile(values.flatten(), 1 - KEPT_TOKENS) * scale))
