"""The contract of a backbone, for every backbone: slim networks, quantization, FLOPs and exported graphs."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dyexport.backbones import BACKBONES
from dyexport.backbones.base import Inputs
from dyexport.bundle.plan import Segment
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import read_widths
from dyexport.exporters.onnx_graph import STORE, check_onnx, export_onnx
from dyexport.exporters.weight_store import write_store
from dyexport.flops import FlopsModel
from dyexport.lora import LoraSpec, Variant
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.slicing.merging import merging_reader, updated_names
from dyexport.slicing.quantizing import linear_inputs, quantizable_weights
from dyexport.slicing.slicer import Slice, slice_conditioning
from dyexport.slicing.slim_lora import LowRankPath
from dyexport.slicing.store_layout import lay_out
from tests.backbones.tiny import CLOSE, EARLY, LATE, MIDDLE, noised, t_at
from tests.factories import random_timesteps, shared_tiny_model, tiny_model, tiny_preset
from tests.slicing.cut import Cutter, assert_kept, fits, routed_inputs

pytestmark = pytest.mark.parametrize("backbone", BACKBONES)
token_paths = pytest.mark.parametrize("path", ["masked", "capacity", "dynamic", "compact"])


@torch.no_grad()
@token_paths
def test_slim_networks_equal_the_masked_model(backbone: str, path: str) -> None:
    """On every token path, at random t, one network or four."""
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    cutter, inputs = Cutter(model, preset), NoisedInputs(preset=preset, batch_size=2)
    widths, stats = read_widths(model, preset.timestep_range), measure_tokens(model, inputs, points=32, repeats=8)
    for engines in (1, 4):
        settings = PlanSettings(engines=engines, token_path=path, capacity_margin=0.2)
        segments = make_segments(widths, stats, FlopsModel.of_preset(preset), settings)
        compared = 0
        for segment in segments:
            slim = cutter.load(segment)
            for t in random_timesteps(preset, 24):
                if not segment.start <= t < segment.end:
                    continue
                arguments = inputs.at(t)
                reference = model(arguments)
                routed = routed_inputs(segment, widths, stats, t)
                if not fits(segment, reference.tokens.sum(-1), len(routed.get("slots", ()))):
                    continue
                sample, *kept = slim(**cutter.inputs(arguments), **routed)
                torch.testing.assert_close(sample, reference.sample, **CLOSE)
                assert_kept(segment, kept, reference.tokens)
                compared += 1
        assert compared >= 16


@torch.no_grad()
@token_paths
def test_no_token_kept_is_no_special_case(backbone: str, path: str) -> None:
    model, preset = tiny_model(backbone), tiny_preset(backbone)
    for router in model.block_routers:
        assert router.tokens is not None
        router.tokens.last.bias.fill_(-1e4)
    inputs, t = NoisedInputs(preset=preset, batch_size=2), t_at(backbone, MIDDLE)
    widths, stats = read_widths(model, preset.timestep_range), measure_tokens(model, inputs, points=4, repeats=1)
    settings = PlanSettings(engines=1, token_path=path)
    (segment,) = make_segments(widths, stats, FlopsModel.of_preset(preset), settings)
    cutter, reference = Cutter(model, preset), model(inputs.at(t))
    assert reference.tokens.sum() == 0
    routed = routed_inputs(segment, widths, stats, t)
    sample, *kept = cutter.load(segment)(**cutter.inputs(inputs.at(t)), **routed)
    assert_kept(segment, kept, reference.tokens)
    torch.testing.assert_close(sample, reference.sample, **CLOSE)


@torch.no_grad()
def test_the_dense_network_equals_the_stock_module(backbone: str) -> None:
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    cutter = Cutter(model, preset)
    dense = cutter.dense.load(cutter.read)
    for t in random_timesteps(preset, 4):
        arguments = NoisedInputs(preset=preset, batch_size=3).at(t)
        sample = dense(**cutter.inputs(arguments))[0]
        torch.testing.assert_close(sample, model.forward_dense(arguments), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("variant", get_args(Variant))
def test_low_rank_paths_are_exact_at_every_t(backbone: str, variant: Variant) -> None:
    preset = tiny_preset(backbone)
    model = random_dynamic(preset, td_lora=LoraSpec(rank=2, experts=3, alpha=3, variant=variant))
    cutter, inputs = Cutter(model, preset), NoisedInputs(preset=preset, batch_size=2)
    widths, stats = read_widths(model, preset.timestep_range), measure_tokens(model, inputs, points=8, repeats=2)
    for segment in make_segments(widths, stats, FlopsModel.of_preset(preset), PlanSettings(engines=2)):
        slim = cutter.load(segment)
        for share in (EARLY, LATE):
            t = segment.start + share * (segment.end - segment.start)
            sample = slim(**cutter.inputs(inputs.at(t)), **routed_inputs(segment, widths, stats, t))[0]
            torch.testing.assert_close(sample, model(inputs.at(t)).sample, **CLOSE)


def test_td_lora_updates_linears_that_slim_networks_have_paths_for(backbone: str) -> None:
    preset = tiny_preset(backbone)
    model = random_dynamic(preset, td_lora=LoraSpec(rank=2, experts=3, alpha=3))
    for block in model.adapter.blocks(model.backbone):
        assert all(isinstance(block.get_submodule(name), nn.Linear) for name in model.adapter.lora_targets(block))
    cutter = Cutter(model, preset)
    assert model.td_lora is not None
    updates = {f"td_lora.{name}" for name in read(model, model.td_lora, backbone)}
    assert updates <= sources(cutter.dense) | sources(slice_conditioning(cutter.context))
    merged = cutter.cut(cutter.dense_segment.model_copy(update={"merged": True}))
    by_name = {source.rsplit(":", 1)[-1] for source in sources(merged) if source.startswith("merged:")}
    dense = shared_tiny_model(backbone)
    assert by_name == updated_names(cutter.spec) & read(dense, dense.backbone, backbone)


def read(model: DynamicTransformer, module: nn.Module, backbone: str) -> set[str]:
    """Parameters of a part of the model that its output depends on."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    output = model.forward_dense(noised(backbone)).sum()
    gradients = torch.autograd.grad(output, parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def sources(slice_: Slice) -> set[str]:
    return {source for recipe in slice_.recipes.values() for source in recipe.sources}


def test_every_weight_is_in_one_of_the_two_networks(backbone: str) -> None:
    """Weights of a segment are stored for each segment; those of the conditioning network once.

    A weight that the output does not depend on is in neither.
    """
    cutter = Cutter(shared_tiny_model(backbone), tiny_preset(backbone))
    conditioning, segment = sources(slice_conditioning(cutter.context)), sources(cutter.dense)
    weights = read(cutter.model, cutter.model.backbone, backbone)
    assert not conditioning & segment & weights
    assert weights <= conditioning | segment
    unread = {name for name, _ in cutter.model.backbone.named_parameters()} - weights
    assert not unread & (conditioning | segment)


@torch.no_grad()
def test_rows_of_the_conditioning_network_are_independent(backbone: str) -> None:
    preset, rows = tiny_preset(backbone), 6
    cutter = Cutter(shared_tiny_model(backbone), preset)
    inputs = NoisedInputs(preset=preset, batch_size=1).over(random_timesteps(preset, rows))
    arguments = [inputs[spec.name] for spec in slice_conditioning(cutter.context).inputs]
    together = cutter.conditioning(*arguments)
    (modulation,) = (spec for spec in cutter.dense.inputs if spec.name == "modulation")
    assert together.shape == (rows, modulation.shape[1])
    for row in range(rows):
        alone = cutter.conditioning(*(value[row : row + 1] for value in arguments))
        torch.testing.assert_close(alone[0], together[row])


def test_no_linear_of_a_block_is_left_out_of_quantization(backbone: str) -> None:
    """Whatever multiplies in a block is quantizable, a low-rank path, or made in fp32."""
    preset = tiny_preset(backbone)
    model = random_dynamic(preset, td_lora=LoraSpec(rank=2, alpha=2))
    module = Cutter(model, preset, "bf16").cut(routed(Cutter(model, preset).dense_segment)).module
    weights = quantizable_weights(module)
    rest = {
        name
        for name, parameter in module.get_submodule("blocks").named_parameters(prefix="blocks")
        if parameter.ndim >= 2 and name not in weights and parameter.dtype != torch.float32
    }
    paths = {name for name, layer in module.named_modules() if isinstance(layer, LowRankPath)}
    assert {name.rsplit(".", 1)[0] for name in rest} == paths
    assert len(weights) >= 4 * preset.depth
    assert all(name.startswith("blocks.") for name in weights)
    quantized = Cutter(model, preset, quantization="int8").dense
    codes = {name for name, recipe in quantized.recipes.items() if recipe.quantization and not recipe.scales}
    assert codes == weights == linear_inputs(quantized).keys()


@torch.no_grad()
def test_half_precision_stays_close(backbone: str) -> None:
    """Rounding errors of bf16 weights and products, and of nothing that must stay in fp32."""
    model, inputs = shared_tiny_model(backbone), noised(backbone)
    half = Cutter(model, tiny_preset(backbone), "bf16")
    sample = half.load(routed(half.dense_segment))(**half.inputs(inputs))[0]
    assert sample.dtype == torch.float32
    assert half.conditioning(*conditions_of(half, inputs)).dtype == torch.float32
    full = Cutter(model, tiny_preset(backbone))
    expected = full.load(routed(full.dense_segment))(**full.inputs(inputs))[0]
    assert (sample - expected).norm() < 0.05 * expected.norm()


def routed(segment: Segment) -> Segment:
    """The same with token routers whose masks multiply."""
    return segment.model_copy(update={"token_paths": ("masked",) * segment.depth})


def test_flops_are_what_slim_networks_multiply(backbone: str) -> None:
    """The dense network and its conditioning; what stock modules compute more than once is counted once."""
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    flops = FlopsModel.of_preset(preset)
    static, dynamic = Cutter(model, preset, token_routers=False), Cutter(model, preset)
    assert conditioning_products(static) == flops.conditioning
    assert conditioning_products(dynamic) == pytest.approx(flops.routed_conditioning, rel=0.01)
    assert products(static, static.dense_segment) == flops.dense
    routers = products(dynamic, routed(dynamic.dense_segment)) - flops.dense
    assert routers == pytest.approx(flops.router.sum(), rel=0.01)


def test_flops_of_low_rank_paths_are_what_they_multiply(backbone: str) -> None:
    preset = tiny_preset(backbone)
    spec = LoraSpec(rank=2, experts=3, alpha=3, variant="symmetric")  # which mixes experts without a product
    cutter = Cutter(random_dynamic(preset, td_lora=spec), preset, token_routers=False)
    merged = cutter.dense_segment.model_copy(update={"merged": True})
    flops = FlopsModel.of_preset(preset)
    paths = products(cutter, cutter.dense_segment) - products(cutter, merged)
    assert paths == flops.low_rank.sum() * spec.width
    assert flops.low_rank_ratio(spec) == paths / flops.dense


@torch.no_grad()
def products(cutter: Cutter, segment: Segment) -> int:
    """Multiply-adds of one sample through a slim network and its conditioning network."""
    inputs = NoisedInputs(preset=cutter.preset, batch_size=1).at(cutter.preset.timestep_range[0])
    read = merging_reader(cutter.model, cutter.read)
    network, conditioning = cutter.cut(segment).load(read), cutter.conditioning
    arguments = cutter.inputs(inputs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        conditioning(*conditions_of(cutter, inputs))
        network(**arguments)
    return counter.get_total_flops() // 2


@torch.no_grad()
def conditioning_products(cutter: Cutter) -> int:
    """Multiply-adds of one sample through a conditioning network."""
    inputs = NoisedInputs(preset=cutter.preset, batch_size=1).at(cutter.preset.timestep_range[0])
    with FlopCounterMode(display=False) as counter:
        cutter.conditioning(*conditions_of(cutter, inputs))
    return counter.get_total_flops() // 2


def conditions_of(cutter: Cutter, inputs: Inputs) -> list[Tensor]:
    """Arguments of the conditioning network."""
    return [inputs[spec.name] for spec in slice_conditioning(cutter.context).inputs]


@torch.no_grad()
@pytest.mark.parametrize("network", ["conditioning", "dense"])
def test_exported_graphs_equal_the_slim_networks(backbone: str, network: str, tmp_path: Path) -> None:
    cutter, inputs = Cutter(shared_tiny_model(backbone), tiny_preset(backbone)), noised(backbone)
    slice_ = cutter.dense if network == "dense" else slice_conditioning(cutter.context)
    feed = cutter.inputs(inputs) if network == "dense" else {spec.name: inputs[spec.name] for spec in slice_.inputs}
    layout = lay_out(slice_.recipes.values())
    write_store(layout, cutter.read, tmp_path / STORE)
    export_onnx(slice_, layout, tmp_path / "network.onnx")
    check_onnx(tmp_path / "network.onnx")
    session = ort.InferenceSession(str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"])
    assert {value.name: value.shape for value in session.get_inputs()} == {
        spec.name: list(spec.shape) for spec in slice_.inputs
    }
    assert [value.name for value in session.get_outputs()] == list(slice_.outputs)
    expected = slice_.load(cutter.read)(**feed)
    (sample,) = session.run(None, {name: value.numpy() for name, value in feed.items()})
    np.testing.assert_allclose(sample, (expected[0] if network == "dense" else expected).numpy(), atol=1e-4)
