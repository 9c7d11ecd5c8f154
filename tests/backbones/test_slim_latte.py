"""The slim Latte where it is not like DiT: frames, sizes, positions, and the modulation that samples share."""

from __future__ import annotations

import pytest
import torch

from dyexport.models.inputs import NoisedInputs
from tests.factories import random_timesteps, shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter

MODEL, PRESET = shared_tiny_model("latte"), tiny_preset("latte")
CUTTER = Cutter(MODEL, PRESET)


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    return CUTTER.load(CUTTER.dense_segment)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4), (3, 10, 6), (1, 2, 8)])
def test_frames_and_sizes_that_the_stock_module_takes(dense: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """Its positions are stretched over a frame of any size; one frame has no place in time."""
    inputs = {**NoisedInputs(preset=PRESET, batch_size=2).at(412.5), "hidden_states": torch.randn(2, 2, *shape)}
    (sample,) = dense(**CUTTER.inputs(inputs))
    assert sample.shape == (2, 4, *shape)
    torch.testing.assert_close(sample, MODEL.forward_dense(inputs), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("words", [1, 9])
def test_any_length_of_text(dense: torch.nn.Module, words: int) -> None:
    inputs = dict(NoisedInputs(preset=PRESET, batch_size=2).at(88.0))
    before = dense(**CUTTER.inputs(inputs))[0]
    inputs["encoder_hidden_states"] = torch.randn(2, words, 6)
    sample = dense(**CUTTER.inputs(inputs))[0]
    assert not torch.allclose(sample, before, atol=1e-3)
    torch.testing.assert_close(sample, MODEL.forward_dense(inputs), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_conditioning_is_what_stock_blocks_add_their_tables_to() -> None:
    times = torch.tensor(random_timesteps(PRESET, 7))
    shared, embedded = MODEL.backbone.adaln_single(times, hidden_dtype=torch.float32)  # (7, 6 C), (7, C)
    vectors = CUTTER.conditioning(times).view(7, 8, 32)
    scales = torch.tensor([0, 1, 0, 0, 1, 0])[None, :, None]
    torch.testing.assert_close(vectors[:, :6], shared.view(7, 6, 32) + scales, atol=1e-5, rtol=1e-5)
    final = embedded[:, None] + MODEL.backbone.scale_shift_table + torch.tensor([0, 1])[None, :, None]
    torch.testing.assert_close(vectors[:, 6:], final, atol=1e-5, rtol=1e-5)


def test_half_precision_keeps_patches_modulation_and_positions_in_fp32() -> None:
    recipes = Cutter(MODEL, PRESET, precision="bf16").dense.recipes
    full = {name for name, recipe in recipes.items() if recipe.dtype == torch.float32}
    assert full == {
        "patch.weight",
        "patch.bias",
        "positions.spatial",
        "positions.temporal",
        *(f"blocks.{index}.table" for index in range(4)),
    }
