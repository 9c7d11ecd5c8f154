"""The pieces of the slim networks against the plain maths they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dyexport.bundle.plan import Segment
from dyexport.slicing.linears import TransposedLinear
from dyexport.slicing.modulation import BlockModulation, FinalModulation, modulated_norm
from dyexport.slicing.slim_layers import (
    Selection,
    gate_units,
    run_selected,
    select_tokens,
    split_gates,
)

LIMITED, EXACT = ["capacity", "dynamic"], ["masked", "compact"]
CHANNELS = 3


@st.composite
def router_scores(draw: st.DrawFn) -> Tensor:
    """Logits (B, N), all different in size, at any share of tokens that are kept: none and all among them."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    order = draw(st.permutations(range(1, batch * tokens + 1)))
    signs = draw(st.lists(st.sampled_from([1, -1, 0]), min_size=batch * tokens, max_size=batch * tokens))
    return (torch.tensor(order) * torch.tensor(signs)).float().view(batch, tokens)


class Branch:
    """Some function of two inputs, which remembers how many rows it was given."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, value: Tensor, other: Tensor) -> Tensor:
        self.rows += len(value)
        return value.sin() + other[:, :1]  # (R, C)


def branch_inputs(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, CHANNELS, generator=generator), torch.randn(tokens, 2, generator=generator)


def masked(keep: Tensor) -> Tensor:
    """Plain masking: every row computed, rows of (B, N) that are not kept times zero."""
    return Branch()(*branch_inputs(keep.numel())) * keep.view(-1, 1)


@pytest.mark.parametrize("use_topk", [True, False])
@pytest.mark.parametrize("path", EXACT + LIMITED)
@given(scores=router_scores(), spare=st.integers(0, 6))
def test_every_path_equals_masking(path: Any, use_topk: bool, scores: Tensor, spare: int) -> None:
    keep = scores > 0
    most = int(keep.sum(1).max())
    branch, capacity = Branch(), min(max(most + spare, 1), scores.shape[1])
    selection = select_tokens(path, scores, capacity, use_topk=use_topk)
    update = run_selected(selection, branch, *branch_inputs(scores.numel()))
    torch.testing.assert_close(update, masked(keep))
    rows = {"masked": scores.numel(), "compact": int(keep.sum())}.get(path, len(scores) * capacity)
    assert branch.rows == rows, "no more is computed than the path is for"
    if path in LIMITED:
        assert selection.kept is not None
        assert torch.equal(selection.kept, keep.sum(1))
    else:
        assert selection.kept is None


@pytest.mark.parametrize("path", LIMITED)
@given(scores=router_scores(), capacity=st.integers(1, 6))
def test_a_small_capacity_goes_to_the_highest_scores(path: Any, scores: Tensor, capacity: int) -> None:
    capacity = min(capacity, scores.shape[1])
    lowest = scores.sort(dim=1, descending=True).values[:, capacity - 1 : capacity]  # (B, 1)
    selection = select_tokens(path, scores, capacity)
    update = run_selected(selection, Branch(), *branch_inputs(scores.numel()))
    torch.testing.assert_close(update, masked((scores >= lowest) & (scores > 0)))
    assert selection.kept is not None
    assert torch.equal(selection.kept, (scores > 0).sum(1)), "what the router keeps, not what ran"


@given(scores=router_scores(), capacity=st.integers(1, 6))
def test_a_small_capacity_without_topk_goes_to_the_first_tokens(scores: Tensor, capacity: int) -> None:
    keep, capacity = scores > 0, min(capacity, scores.shape[1])
    selection = select_tokens("capacity", scores, capacity, use_topk=False)
    update = run_selected(selection, Branch(), *branch_inputs(scores.numel()))
    torch.testing.assert_close(update, masked(keep & (keep.cumsum(1) <= capacity)))
    assert selection.kept is not None
    assert torch.equal(selection.kept, keep.sum(1))


def test_without_a_router_every_token_runs() -> None:
    branch, inputs = Branch(), branch_inputs(5)
    assert torch.equal(run_selected(Selection(), branch, *inputs), Branch()(*inputs))
    assert branch.rows == 5


def test_weights_of_half_precision_keep_the_branchs_precision() -> None:
    selection = select_tokens("masked", torch.tensor([[1.0, -1.0]]), 2)
    update = run_selected(selection, lambda value: value, torch.ones(2, CHANNELS, dtype=torch.float16))
    assert update.dtype == torch.float16
    assert update.sum(1).tolist() == [CHANNELS, 0]


def test_gates_lie_block_by_block_heads_first() -> None:
    segment = Segment(
        start=0.0,
        end=1.0,
        heads=((0, 2), (1,), (0, 1, 2)),
        groups=((0,), (1, 0), (2,)),
        gated_heads=(True, False, True),
        gated_groups=(True, True, False),
        token_paths=("all",) * 3,
        capacities=(4,) * 3,
    )
    gates = split_gates(segment, torch.arange(float(segment.gate_size)))
    split = [[part if part is None else part.tolist() for part in block[:2]] for block in gates]
    assert split == [[[0, 1], [2]], [None, [3, 4]], [[5, 6, 7], None]]


def test_a_gate_scales_the_channels_of_its_unit() -> None:
    values = torch.randn(5, 6)
    gated = gate_units(values, torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(gated, values * torch.tensor([1, 1, 0, 0, 0.5, 0.5]))
    assert gate_units(values, None) is values


def test_modulated_norm_is_layer_norm_with_an_affine_of_its_own() -> None:
    hidden, shift, scale = torch.randn(2, 4, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    modulation = FinalModulation(shift, scale)
    for sample in range(2):
        expected = F.layer_norm(hidden[sample], (8,), scale[sample, 0], shift[sample, 0], eps=1e-6)
        torch.testing.assert_close(modulated_norm(hidden, modulation)[sample], expected)


def test_scales_start_from_one() -> None:
    parameters = torch.zeros(2, 8 * CHANNELS)
    block, final = BlockModulation.of(parameters[:, : 6 * CHANNELS]), FinalModulation.of(parameters[:, 6 * CHANNELS :])
    assert [float(part.sum()) / part.numel() for part in (*block.vectors, *final)] == [0, 1, 0, 0, 1, 0, 0, 1]


def test_a_transposed_linear_is_a_linear() -> None:
    layer, value = TransposedLinear(4, 3), torch.randn(5, 4)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(value), F.linear(value, layer.weight.T, layer.bias))
