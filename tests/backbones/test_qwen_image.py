"""Qwen-Image: positions, padded prompts, configurations, and what its stand-in refuses."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Inputs
from dyexport.backbones.qwen_image.preset import QwenImagePreset
from dyexport.backbones.qwen_image.slim import token_positions
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.errors import CheckpointError, EngineMismatchError
from dyexport.exporters.onnx_graph import export_onnx
from dyexport.presets import PRESETS, preset_from_config
from dyexport.runtime.loading import load
from dyexport.slicing.slicer import slice_conditioning, slice_segment
from dyexport.slicing.store_layout import lay_out
from dyexport.verification.verify import find_reference
from tests.exporters.networks import half_width, slice_context
from tests.factories import shared_tiny_model
from tests.slicing.cut import Cutter

PRESET = PRESETS["qwen-image-tiny"]
assert isinstance(PRESET, QwenImagePreset)
PUBLISHED = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}
"""The configuration in Qwen/Qwen-Image, which has an argument that diffusers has dropped since."""


@pytest.fixture(scope="module")
def built(qwen_image_tiny: Bundle) -> Bundle:
    return qwen_image_tiny


@pytest.fixture(scope="module")
def loaded(built: Bundle) -> Any:
    return load(built.root)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 5, 7), (1, 64, 36), (1, 1, 1), (3, 2, 9)])
def test_positions_are_those_of_diffusers(shape: tuple[int, int, int]) -> None:
    cutter = Cutter(shared_tiny_model("qwen_image"), PRESET)
    tokens, words = shape[0] * shape[1] * shape[2], 11
    rotary = cutter.dense.load(cutter.read).angles(token_positions(torch.tensor(shape), tokens, words))
    embedding = QwenEmbedRope(theta=10000, axes_dim=list(PRESET.rope_axes), scale_rope=True)
    image, text = embedding([[shape]], max_txt_seq_len=words, device=torch.device("cpu"))
    expected = torch.cat([text, image])
    torch.testing.assert_close(rotary.cos, expected.real, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotary.sin, expected.imag, atol=1e-6, rtol=0)


def prompts(*lengths: int) -> Inputs:
    """Samples with prompts of these lengths; what lies in the padding is noise."""
    draw, count, words = torch.Generator().manual_seed(0), len(lengths), max(lengths)
    return {
        "hidden_states": torch.randn(count, PRESET.tokens, PRESET.in_channels, generator=draw),
        "encoder_hidden_states": torch.randn(count, words, PRESET.joint_size, generator=draw),
        "encoder_hidden_states_mask": (torch.arange(words) < torch.tensor(lengths).unsqueeze(1)).float(),
        "timestep": torch.full((count,), 0.4),
        "img_shapes": torch.tensor([1, PRESET.side, PRESET.side]),
    }


def alone(inputs: Inputs, row: int) -> dict[str, Any]:
    """One sample without its padding, as a pipeline passes it: no mask, and shapes in lists."""
    words = int(inputs["encoder_hidden_states_mask"][row].sum())
    one = {name: inputs[name][row : row + 1] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
    shapes = [[tuple(inputs["img_shapes"].tolist())]]
    return {**one, "encoder_hidden_states": one["encoder_hidden_states"][:, :words], "img_shapes": shapes}


@torch.no_grad()
def test_padding_of_prompts_changes_nothing(built: Bundle, loaded: Any) -> None:
    model, _ = load_dynamic(find_reference(built))
    inputs = prompts(3, 9, 1)
    together, reference = loaded(**inputs).sample, model(inputs).sample
    torch.testing.assert_close(together, reference, atol=2e-5, rtol=1e-5)
    for row in range(3):
        torch.testing.assert_close(loaded(**alone(inputs, row)).sample, together[row : row + 1], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_may_have_holes_and_any_type(built: Bundle, loaded: Any) -> None:
    model, _ = load_dynamic(find_reference(built))
    inputs = {**prompts(6), "encoder_hidden_states_mask": torch.tensor([[0.0, 1, 1, 0, 1, 0]])}
    reference = model(inputs).sample
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        mask = inputs["encoder_hidden_states_mask"].to(dtype)
        sample = loaded(**{**inputs, "encoder_hidden_states_mask": mask}).sample
        torch.testing.assert_close(sample, reference, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_one_negative_prompt_serves_a_batch(loaded: Any) -> None:
    one, several = prompts(4), prompts(4, 4)
    text = {"encoder_hidden_states": one["encoder_hidden_states"], "encoder_hidden_states_mask": torch.ones(1, 4)}
    repeated = {name: value.expand(2, *value.shape[1:]) for name, value in text.items()}
    assert torch.equal(loaded(**{**several, **text}).sample, loaded(**{**several, **repeated}).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": None}, "timestep"),
        ({"guidance": torch.tensor([3.5])}, "guidance .*true_cfg_scale"),
        ({"controlnet_block_samples": [torch.zeros(1)]}, "controlnet_block_samples .*ControlNet"),
        ({"additional_t_cond": torch.zeros(1, dtype=torch.int64)}, "additional_t_cond .*layered"),
        ({"attention_kwargs": {"scale": 0.5}}, "scale"),
        ({"encoder_hidden_states_mask": torch.ones(1, 5)}, r"encoder_hidden_states_mask must be .*\[1, 6\]"),
        ({"img_shapes": None}, "img_shapes is None"),
        ({"img_shapes": [[(1, 8, 8), (1, 8, 8)]]}, "2 pictures"),
        ({"img_shapes": [[(1, 8, 8)], [(1, 4, 16)]]}, "differ"),
        ({"img_shapes": [[(1, 8, 7)]]}, r"\[1, 8, 7\], but hidden_states has 64 tokens"),
        ({"img_shapes": [[(8, 8)]]}, "frames, rows, columns"),
    ],
)
def test_what_it_cannot_do_is_refused(loaded: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineMismatchError, match=message):
        loaded(**{**prompts(6), **changes})


def test_the_published_configuration_is_the_preset() -> None:
    assert preset_from_config(PUBLISHED, "mine").parameters == PRESETS["qwen-image"].parameters
    assert preset_from_config({**PUBLISHED, "num_layers": 12}, "mine").depth == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_cond_t": True}, "zero_cond_t"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope"),
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"patch_size": 1}, "patch_size"),
        ({"out_channels": 32}, "out_channels"),
        ({"axes_dims_rope": [16, 56, 58]}, "axes_dims_rope"),
    ],
)
def test_other_structures_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        preset_from_config({**PUBLISHED, **changes}, "mine")


@pytest.mark.slow
def test_graphs_of_the_published_size_are_exported_without_its_weights(tmp_path: Path) -> None:
    """60 blocks of 3072 channels: 27 GB of weights in bf16."""
    preset = PRESETS["qwen-image"]
    context = slice_context(preset, "bf16")
    networks = {"segment": slice_segment(context, half_width(preset, "dynamic")), "cond": slice_conditioning(context)}
    layout = lay_out(recipe for network in networks.values() for recipe in network.recipes.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for name, network in networks.items():
        export_onnx(network, layout, tmp_path / f"{name}.onnx")
        graph = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph
        stored = {tensor.name for tensor in graph.initializer if tensor.external_data}
        assert stored == network.recipes.keys()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < min(network.nbytes for network in networks.values()) / 10


def test_random_prompts_differ_in_length() -> None:
    conditions = get_conditioning(PRESET).random(16, torch.Generator().manual_seed(0))
    text, mask = conditions["encoder_hidden_states"], conditions["encoder_hidden_states_mask"]
    assert len(set(mask.sum(1).tolist())) > 4
    assert mask[:, 0].all()
    assert text[mask == 0].count_nonzero() == 0
