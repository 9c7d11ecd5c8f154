"""Ranges are those of the pass, fake quantization is that of engines, and ranges of a segment's own t are worth it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import Quantization
from dyexport.calibration.ranges import fake_quantized, measure_ranges, quantization_error
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from dyexport.slicing.quantizing import LinearInput
from tests.pipeline.tiny import TINY
from tests.slicing.test_quantizing import KINDS

INPUTS = NoisedInputs(preset=TINY, batch_size=2)
FC1 = LinearInput("transformer_blocks.1.ff.net.0.proj", None)
FC2 = LinearInput("transformer_blocks.1.ff.net.2", None)


def test_ranges_are_the_largest_of_what_is_read() -> None:
    model = random_dynamic(TINY)
    seen: list[torch.Tensor] = []
    handle = model.backbone.get_submodule(FC2.module).register_forward_pre_hook(lambda _, read: seen.append(read[0]))
    ranges = measure_ranges(model.backbone, model, INPUTS, (0.2, 0.8), (FC1, FC2))
    handle.remove()
    assert ranges[FC2] == float(torch.cat(seen).abs().max())
    assert ranges[FC1] != ranges[FC2]
    assert not model.backbone.get_submodule(FC1.module)._forward_pre_hooks


@torch.no_grad()
def test_a_linear_of_flux_has_a_range_for_each_part_that_it_reads() -> None:
    preset = get_preset("flux-tiny")
    model = random_dynamic(preset)
    linear = model.backbone.single_transformer_blocks[0].proj_out
    channels = linear.out_features
    parts = [
        LinearInput("single_transformer_blocks.0.proj_out", span) for span in ((0, channels), (channels, 5 * channels))
    ]
    seen: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda _, read: seen.append(read[0].flatten(0, 1)))
    ranges = measure_ranges(model.backbone, model, NoisedInputs(preset=preset, batch_size=1), (0.5,), parts)
    whole = torch.cat(seen).abs().amax(0)
    assert [ranges[part] for part in parts] == [float(whole[:channels].max()), float(whole[channels:].max())]


@torch.no_grad()
@pytest.mark.parametrize("quantization", KINDS)
def test_fake_quantized_linears_read_rounded_weights_and_inputs(quantization: Quantization) -> None:
    model = random_dynamic(TINY)
    linear = model.backbone.get_submodule(FC2.module)
    read, largest = torch.randn(5, linear.in_features), 2.0  # some of it is beyond
    with fake_quantized(model.backbone, {FC2: largest}, quantization):
        output = linear(read)
    if quantization == "int8":
        rounded = (read * 127 / largest).round().clamp(-127, 127) * largest / 127
        steps = linear.weight.abs().amax(1, keepdim=True) / 127
        weight = (linear.weight / steps).round() * steps
    else:
        rounded = (read * 448 / largest).clamp(-448, 448).to(torch.float8_e4m3fn).float() * largest / 448
        steps = linear.weight.abs().amax(1, keepdim=True) / 448
        weight = (linear.weight / steps).to(torch.float8_e4m3fn).float() * steps
    torch.testing.assert_close(output, rounded @ weight.T + linear.bias, atol=1e-5, rtol=1e-5)
    assert (output - linear(read)).abs().max() > 1e-3, "and outside it is the linear again"


def segment(start: float, end: float) -> Segment:
    every = (tuple(range(TINY.heads)),) * TINY.depth
    return Segment(
        start=start,
        end=end,
        heads=every,
        groups=every,
        gated_heads=(False,) * TINY.depth,
        gated_groups=(False,) * TINY.depth,
        token_paths=("masked",) * TINY.depth,
        capacities=(TINY.tokens,) * TINY.depth,
    )


@torch.no_grad()
def growing_with_t() -> DynamicTransformer:
    """adaLN's scale of the second block's MLP rises with t, so that what its fc1 reads becomes 16 times as large."""
    model = random_dynamic(TINY, tokens=False)
    linear = model.backbone.transformer_blocks[1].norm1.linear  # (6 C, C): shift, scale and gate, twice
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, read: seen.append(read[0]))
    times = torch.linspace(0, 1, 64)
    for t in times:
        model(INPUTS.at(float(t)))
    handle.remove()
    rising = (15 * times).repeat_interleave(INPUTS.batch_size).unsqueeze(1)  # (T * B, 1)
    scale = slice(4 * linear.in_features, 5 * linear.in_features)
    linear.weight[scale] = torch.linalg.lstsq(torch.cat(seen), rising).solution.T
    linear.bias[scale] = 0.0
    return model


@torch.no_grad()
def test_ranges_of_its_own_t_spare_a_segment_the_steps_of_the_largest() -> None:
    model = growing_with_t()
    ends = [segment(0.0, 0.2), segment(0.8, 1.0)]
    own = [measure_ranges(model.backbone, model, INPUTS, np.linspace(s.start, s.end, 4).tolist(), (FC1,)) for s in ends]
    errors = [quantization_error(model, INPUTS, s, ranges, "int8") for s, ranges in zip(ends, own, strict=True)]
    assert own[1][FC1] > 3 * own[0][FC1]
    assert quantization_error(model, INPUTS, ends[0], own[1], "int8") > 4 * errors[0]
