"""The masked FLUX against the stock module, masks applied by hand, and a second token router."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Inputs
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.bundle.spec import TokenRouterKind
from dyexport.calibration.widths import read_widths
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import PRESETS
from tests.factories import rank_units

PRESET = PRESETS["flux-tiny"]
assert isinstance(PRESET, FluxPreset)
INPUTS = NoisedInputs(preset=PRESET, batch_size=2)
HEAD, GROUP = 32, 128  # channels
FLOPS = FlopsModel.of_preset(PRESET)


def model(*, tokens: bool = True, token_router: TokenRouterKind | None = None) -> DynamicTransformer:
    return random_dynamic(PRESET, tokens=tokens, token_router=token_router)


def blocks(dynamic: DynamicTransformer) -> list[torch.nn.Module]:
    return dynamic.adapter.blocks(dynamic.backbone)


@torch.no_grad()
def test_a_model_without_guidance_is_the_stock_module() -> None:
    preset = replace(PRESET, guidance=PRESETS["flux-schnell"].guidance)
    stock = FluxTransformer2DModel(**preset.transformer_config()).eval()
    inputs = NoisedInputs(preset=preset, batch_size=3).at(0.7)
    assert "guidance" not in inputs
    expected = stock(**inputs).sample
    dynamic = DynamicTransformer(stock, get_adapter("flux"), heads=4)
    assert torch.equal(dynamic(inputs).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("t", [0.0, 0.31, 0.77, 1.0])
def test_masks_equal_zeroed_weights(t: float) -> None:
    dynamic = model(tokens=False)
    heads, groups = (gates[0] for gates in dynamic.width_gates(torch.tensor([t])))
    assert 0 < heads.mean() < 1, "this test needs some heads off"
    masked = dynamic(INPUTS.at(t)).sample
    for index, block in enumerate(blocks(dynamic)):
        head, group = heads[index].repeat_interleave(HEAD), groups[index].repeat_interleave(GROUP)
        if index < 2:
            for linear in (block.attn.to_out[0], block.attn.to_add_out):
                linear.weight.mul_(head)
            for mlp in (block.ff, block.ff_context):
                mlp.net[2].weight.mul_(group)
        else:
            block.proj_out.weight.mul_(torch.cat([head, group]))
    torch.testing.assert_close(dynamic.forward_dense(INPUTS.at(t)), masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", PRESET.token_routers)
def test_skipped_image_tokens_miss_what_they_should(kind: TokenRouterKind) -> None:
    """With every image token off, double blocks lose the image MLP and single blocks the image's whole update."""
    dynamic = model(token_router=kind)
    for router in dynamic.block_routers:
        router.tokens.last.bias.fill_(-1e4)
    inputs = INPUTS.at(0.4)
    skipped = dynamic(inputs)
    assert skipped.tokens.sum() == 0
    heads, groups = dynamic.width_gates(inputs["timestep"])
    for block in blocks(dynamic)[:2]:
        block.ff.net[2].weight.zero_()
        block.ff.net[2].bias.zero_()
    for block in blocks(dynamic)[2:]:
        block.register_forward_hook(lambda _, args, kwargs, out: (out[0], kwargs["hidden_states"]), with_kwargs=True)
    expected = dynamic.forward_masked(inputs, heads=heads, groups=groups)
    torch.testing.assert_close(skipped.sample, expected, atol=1e-5, rtol=1e-5)


def straightforward_logits(weights: dict[str, Tensor], image: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """Token router logits, token by token as the paper's figure draws it: (N,)."""

    def prepared(token: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        return (normed * weights["norm.weight"] + weights["norm.bias"]) * (1 + scale) + shift

    four = weights["linear_t.weight"] @ (temb * temb.sigmoid()) + weights["linear_t.bias"]  # (4C,)
    shift, scale, text_shift, text_scale = four.split(len(four) // 4)
    summary = sum(prepared(token, text_shift, text_scale) for token in text) / len(text)
    logits = [weights["router.weight"][0] @ (prepared(token, shift, scale) + summary) for token in image]
    return torch.stack(logits) + weights["router.bias"]


def residuals(dynamic: DynamicTransformer, inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Image, text and conditioning at the point where each block decides, read off a stock pass."""
    seen: list[dict[str, Tensor]] = [{} for _ in range(dynamic.depth)]

    def entered(index: int, block: object, args: object, kwargs: dict[str, Tensor]) -> None:
        seen[index] = {name: kwargs[name] for name in ("hidden_states", "encoder_hidden_states", "temb")}

    def normed(index: int, name: str, norm: object, args: tuple[Tensor]) -> None:
        seen[index][name] = args[0]

    handles = []
    for index, block in enumerate(blocks(dynamic)):
        handles.append(block.register_forward_pre_hook(partial(entered, index), with_kwargs=True))
        if index < 2:  # after attention
            handles.append(block.norm2.register_forward_pre_hook(partial(normed, index, "hidden_states")))
            handles.append(
                block.norm2_context.register_forward_pre_hook(partial(normed, index, "encoder_hidden_states"))
            )
    dynamic.forward_dense(inputs)
    for handle in handles:
        handle.remove()
    return [(one["hidden_states"], one["encoder_hidden_states"], one["temb"]) for one in seen]


@torch.no_grad()
def test_token_router_reads_what_the_published_one_reads() -> None:
    """Double blocks: both streams after attention. Single blocks: their inputs."""
    dynamic = model(token_router="published")
    for router in dynamic.block_routers:
        for value in (router.tokens.norm.weight, router.tokens.norm.bias):
            value.add_(torch.randn_like(value) * 0.3)
        for part in (router.heads, router.groups, router.tokens.last):
            part.bias.fill_(1e4)  # everything on: blocks see what the stock module's see
    given: list[tuple[Tensor, ...]] = []
    handles = [r.tokens.register_forward_pre_hook(lambda _, args: given.append(args)) for r in dynamic.block_routers]
    inputs = INPUTS.at(0.6)
    assert dynamic(inputs).tokens.all()
    for handle in handles:
        handle.remove()
    for router, read, expected in zip(dynamic.block_routers, given, residuals(dynamic, inputs), strict=True):
        for one, other in zip(read, expected, strict=True):
            assert torch.equal(one, other)
        router.tokens.last.bias.fill_(0.25)
        logits = router.tokens(*read)
        for sample in range(2):
            by_hand = straightforward_logits(router.tokens.state_dict(), *(value[sample] for value in expected))
            torch.testing.assert_close(logits[sample], by_hand, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_widths_follow_the_timestep_alone() -> None:
    """Not guidance, text or resolution."""
    dynamic = model(tokens=False)

    def gates(inputs: Inputs) -> Tensor:
        output = dynamic(inputs)
        return torch.cat([output.heads, output.groups], dim=-1)

    plain = INPUTS.at(0.3)
    other = {
        **plain,
        "guidance": torch.tensor([1.0, 9.0]),
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "txt_ids": torch.zeros(7, 3),
        "pooled_projections": torch.randn(2, 32),
    }
    larger = NoisedInputs(preset=replace(PRESET, side=12), batch_size=2).at(0.3)
    assert torch.equal(gates(other), gates(plain))
    assert torch.equal(gates(larger), gates(plain))
    table = read_widths(dynamic, PRESET.timestep_range)
    assert len(table.grid) > 1
    assert (gates(plain)[0, :, :4].numpy() > 0).tolist() == table.heads[table.row(0.3)].tolist()


def test_ranking_puts_the_most_important_unit_first() -> None:
    dynamic = model(tokens=False)
    favor = torch.tensor([0.01, 0.01, 1.0, 0.01])
    with torch.no_grad():
        for index, block in enumerate(blocks(dynamic)):
            if index < 2:
                for linear in (block.attn.to_out[0], block.attn.to_add_out):
                    linear.weight.mul_(favor.repeat_interleave(HEAD))
            else:
                block.proj_out.weight.mul_(torch.cat([favor.repeat_interleave(s) for s in (HEAD, GROUP)]))
    before = dynamic.forward_dense(INPUTS.at(0.2)).detach()
    rank_units(dynamic, INPUTS, [0.2, 0.8])
    torch.testing.assert_close(dynamic.forward_dense(INPUTS.at(0.2)), before, atol=1e-5, rtol=1e-5)
    heads, groups = unit_importance(dynamic, INPUTS, [0.2])
    assert (heads[0].argmax(axis=-1) == 0).all()
    assert (groups[0, 2:].argmax(axis=-1) == 0).all()


def test_token_router_decides_in_fp32() -> None:
    """A logit of 0.005 is on; in bf16 its sigmoid rounds to one half."""
    router = model(token_router="published").block_routers[0].tokens.bfloat16()
    with torch.no_grad():
        router.router.weight.zero_()
        router.router.bias.fill_(0.005)
    values = (torch.randn(1, 4, 128).bfloat16(), torch.randn(1, 3, 128).bfloat16(), F.silu(torch.randn(1, 128)))
    assert router(*values).dtype == torch.float32
    assert (router(*values) > 0).all()
