"""FLOPs against products counted in real forward passes, and against published figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset
from dyexport.backbones.latte.preset import LattePreset
from dyexport.errors import UsageError
from dyexport.flops import FlopsModel
from dyexport.models.inputs import NoisedInputs
from dyexport.presets import PRESETS


def counted(preset: Preset) -> int:
    """Multiply-adds of one sample through the stock module."""
    adapter = get_adapter(preset.backbone)
    backbone = adapter.build(preset.transformer_config()).eval()
    inputs = NoisedInputs(preset=preset, batch_size=1).at(0.5)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        adapter.run(backbone, inputs)
    return counter.get_total_flops() // 2


def repeated(preset: Preset) -> int:
    """What diffusers multiplies again: DiT's embedder in every block and at the end, Latte's text for each frame."""
    if isinstance(preset, LattePreset):
        return preset.pairs * (preset.frames - 1) * preset.text_tokens * 2 * preset.hidden_size**2
    embedders = 256 * preset.hidden_size + preset.hidden_size**2
    return preset.depth * embedders if preset.backbone == "dit" else 0


@pytest.mark.parametrize("name", ["dit-digits", "flux-tiny", "latte-tiny"])
def test_dense_is_what_the_stock_module_multiplies(name: str) -> None:
    preset = PRESETS[name]
    assert FlopsModel.of_preset(preset).dense == counted(preset) - repeated(preset)


def test_published_figures() -> None:
    """GFLOPs of DiT, arXiv 2212.09748 table 4 (DiT-XL/2 118.64, S/2 6.06, B/2 23.01, L/2 80.71)."""
    for name, published in {"dit-xl-2": 118.64, "dit-s-2": 6.06, "dit-b-2": 23.01, "dit-l-2": 80.71}.items():
        assert FlopsModel.of_preset(PRESETS[name]).dense / 1e9 == pytest.approx(published, rel=2e-3)


def test_a_single_block_loses_its_attention_update_with_its_tokens() -> None:
    """By hand, one sample of 64 image and 16 text tokens at 128 channels."""
    flops = FlopsModel.of_preset(PRESETS["flux-tiny"])
    square, image, text, rows = 128**2, 64, 16, 80
    mixing = 3 * square * rows + 2 * rows**2 * 128
    none = flops.dynamic(np.ones(5), np.ones(5), np.zeros(5))
    double = mixing + square * rows + 8 * square * text
    single = mixing + square * text + 8 * square * text
    assert none == 2 * double + 3 * single
    skipped = [8 * square * image] * 2 + [9 * square * image] * 3
    assert flops.gated == none + sum(skipped)
    assert flops.gated == (flops.head_cost + flops.group_cost).sum()


def test_latte_at_its_published_size() -> None:
    """By hand: 16 frames of 1024 patches at 1152 channels, 28 spatial and 28 temporal blocks."""
    flops = FlopsModel.of_preset(PRESETS["latte"])
    square, tokens = 1152**2, 16 * 1024
    assert flops.gated == 28 * (2 * 12 * square * tokens + 2 * tokens * 1152 * (1024 + 16))
    assert flops.head_cost[0] - flops.head_cost[1] == 2 * tokens * 1152 * (1024 - 16)
    to_text = 28 * (2 * square * (tokens + 120) + 2 * tokens * 120 * 1152)
    assert to_text / flops.static == pytest.approx(1, abs=0.01)
    assert to_text / flops.dense == pytest.approx(1 / 13, abs=0.01)


def test_shares_count_block_by_block_in_numpy_and_in_torch() -> None:
    flops = FlopsModel.of_preset(PRESETS["flux-tiny"])
    shares = np.random.default_rng(0).random((3, 7, 5))
    expected = [
        sum(
            h * (flops.attention[i] + t * flops.attention_tokens[i]) + g * (flops.mlp[i] + t * flops.mlp_tokens[i])
            for i, (h, g, t) in enumerate(zip(*shares[:, row], strict=True))
        )
        for row in range(7)
    ]
    np.testing.assert_allclose(flops.dynamic(*shares), expected)
    np.testing.assert_allclose(flops.dynamic(*torch.from_numpy(shares)).numpy(), expected)


def test_routers_cost_only_where_they_run() -> None:
    flops = FlopsModel.of_preset(PRESETS["flux-tiny"])
    full = np.ones(5)
    assert flops.network_ratio(full, full, full, routed=False) == 1
    expected = (flops.dense + flops.router.sum()) / flops.dense
    assert flops.network_ratio(full, full, full, routed=True) == pytest.approx(expected)


def test_unknown_backbone_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown backbone 'unet'"):
        FlopsModel.of("unet", {}, tokens=1)
