"""Token routers of FLUX in both kinds, and what they cost at full size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dyexport.backbones.base import Preset
from dyexport.bundle.spec import TokenRouterKind
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import read_widths
from dyexport.exporters.onnx_graph import STORE, export_onnx
from dyexport.exporters.weight_store import write_store
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import PRESETS
from dyexport.slicing.slicer import SliceContext, slice_conditioning, spec_of
from dyexport.slicing.store_layout import lay_out
from dyexport.training.cost import FinetuningRun, count_trainable
from tests.backbones.tiny import CLOSE
from tests.factories import random_timesteps
from tests.slicing.cut import Cutter, assert_kept, fits, routed_inputs

FLUX, QWEN, TINY = PRESETS["flux"], PRESETS["qwen-image"], PRESETS["flux-tiny"]
INPUTS = NoisedInputs(preset=TINY, batch_size=2)
kinds = pytest.mark.parametrize("kind", FLUX.token_routers)


def read_by_mlps(model: DynamicTransformer, t: float) -> list[Tensor]:
    """Image rows of what each block's image MLP reads in the stock module: L x (B, N, C)."""
    seen: list[Tensor] = []

    def record(layer: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0][:, -TINY.tokens :])  # text rows come first

    layers = [getattr(block, "ff", None) or block.proj_mlp for block in model.adapter.blocks(model.backbone)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    model.forward_dense(INPUTS.at(t))
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_compact_routers_read_what_the_image_mlp_reads() -> None:
    model = random_dynamic(TINY)
    for router in model.block_routers:
        for part in (router.heads, router.groups, router.tokens.last):
            part.bias.fill_(1e4)  # everything on: blocks see what the stock module's see
    given: list[Tensor] = []
    handles = [r.tokens.register_forward_pre_hook(lambda _, args: given.extend(args)) for r in model.block_routers]
    assert model(INPUTS.at(0.6)).tokens.all()
    for handle in handles:
        handle.remove()
    for router, read, expected in zip(model.block_routers, given, read_by_mlps(model, 0.6), strict=True):
        assert torch.equal(read, expected)
        router.tokens.last.bias.fill_(0.25)
        weights = router.tokens.state_dict()
        assert weights["inner.weight"].shape == (TINY.hidden_size // 16, TINY.hidden_size)
        hidden = (read @ weights["inner.weight"].T + weights["inner.bias"]).clamp(min=0)  # (B, N, C / 16)
        by_hand = (hidden @ weights["outer.weight"].T).squeeze(-1) + 0.25
        torch.testing.assert_close(router.tokens(read), by_hand, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("path", ["masked", "capacity", "dynamic", "compact"])
def test_published_routers_are_exact_on_every_token_path(path: str) -> None:
    """Compact ones, the kind of new models, are compared by the contract of all backbones."""
    model = random_dynamic(TINY, token_router="published")
    cutter = Cutter(model, TINY)
    widths, stats = read_widths(model, TINY.timestep_range), measure_tokens(model, INPUTS, points=16, repeats=4)
    settings = PlanSettings(engines=1, token_path=path, capacity_margin=0.3)
    (segment,) = make_segments(widths, stats, FlopsModel.of_preset(TINY), settings)
    slim, compared = cutter.load(segment), 0
    for t in random_timesteps(TINY, 6):
        reference, routed = model(INPUTS.at(t)), routed_inputs(segment, widths, stats, t)
        if fits(segment, reference.tokens.sum(-1), len(routed.get("slots", ()))):
            sample, *kept = slim(**cutter.inputs(INPUTS.at(t)), **routed)
            torch.testing.assert_close(sample, reference.sample, **CLOSE)
            assert_kept(segment, kept, reference.tokens)
            compared += 1
    assert compared >= 3


@torch.no_grad()
@kinds
def test_graphs_with_token_routers_equal_the_masked_model(kind: TokenRouterKind, tmp_path: Path) -> None:
    model = random_dynamic(TINY, token_router=kind)
    cutter = Cutter(model, TINY)
    segment = cutter.dense_segment.model_copy(update={"token_paths": ("compact",) * TINY.depth})
    slice_ = cutter.cut(segment)
    layout = lay_out(slice_.recipes.values())
    write_store(layout, cutter.read, tmp_path / STORE)
    export_onnx(slice_, layout, tmp_path / "network.onnx")
    session = ort.InferenceSession(str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"])
    for router in model.block_routers:
        for width in (router.heads, router.groups):
            width.shift(1e4)  # every unit, as in the segment
    reference = model(INPUTS.at(0.4))
    assert 0 < reference.tokens.mean() < 1
    assert reference.heads.all()
    feed = {name: value.numpy() for name, value in cutter.inputs(INPUTS.at(0.4)).items()}
    np.testing.assert_allclose(session.run(None, feed)[0], reference.sample.numpy(), atol=1e-4)


def run_of(preset: Preset, kind: TokenRouterKind | None = None) -> FinetuningRun:
    recipe = preset.recipe
    return FinetuningRun(preset=preset, schedule=recipe.finetune_lora, td_lora=recipe.td_lora, token_router=kind)


@pytest.mark.parametrize("preset", [FLUX, QWEN], ids=lambda preset: preset.name)
def test_less_than_three_percent_of_a_large_model_is_trained(preset: Preset) -> None:
    """TD-LoRA and all routers at full size."""
    assert preset.recipe.td_lora is not None
    assert count_trainable(run_of(preset))["trainable_parameters"] < 0.03 * preset.parameters


def test_compact_routers_are_a_sixtieth_of_the_published_ones() -> None:
    """By hand: per block C^2 / 16 against 4 C^2, and vectors."""
    trained = {kind: count_trainable(run_of(FLUX, kind))["trainable_parameters"] for kind in FLUX.token_routers}
    channels, bottleneck = FLUX.hidden_size, FLUX.hidden_size // 16
    published = 4 * channels**2 + 4 * channels + 2 * channels + channels + 1
    compact = channels * bottleneck + bottleneck + bottleneck + 1
    assert trained["published"] - trained["compact"] == FLUX.depth * (published - compact)
    assert compact < published / 60


@pytest.mark.parametrize(
    ("preset", "kind"), [(FLUX, "published"), (FLUX, "compact"), (QWEN, "compact")], ids=lambda v: getattr(v, "name", v)
)
def test_conditioning_at_full_size_costs_what_it_multiplies(preset: Preset, kind: TokenRouterKind) -> None:
    spec = spec_of(preset, preset.transformer_config(), token_router=kind)
    slice_ = slice_conditioning(SliceContext(spec=spec, groups=preset.heads, token_routers=True))
    shapes = [[1 if size == "rows" else size for size in tensor.shape] for tensor in slice_.inputs]
    with FlopCounterMode(display=False) as counter:
        slice_.module(*(torch.empty(shape, device="meta") for shape in shapes))
    vectors = preset.depth * preset.hidden_size if kind == "published" else 0  # of the last layer, which is not counted
    assert counter.get_total_flops() // 2 - vectors == FlopsModel.of_preset(preset, kind).routed_conditioning


def test_compact_routers_take_nothing_from_the_conditioning_network() -> None:
    """At full size it is 0.6 of what it is with published ones; a step costs more, by 0.4 % of the dense network."""
    old, new = (FlopsModel.of_preset(FLUX, kind) for kind in FLUX.token_routers)
    assert new.routed_conditioning == new.conditioning
    assert new.routed_conditioning < 0.61 * old.routed_conditioning
    assert old.router.sum() < new.router.sum() < 0.004 * new.dense
