"""The conditioning network gives what diffusers' blocks make of t and the label."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyexport.backbones.dit.slim_conditioning import DiTLayout
from dyexport.slicing.modulation import modulated_norm
from dyexport.slicing.slicer import slice_conditioning
from tests.factories import random_timesteps, shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter

CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """First argument and result of each module, in the calls made inside."""
    calls: dict[str, tuple[Tensor, Any]] = {}

    def record(name: str) -> Any:
        return lambda module, args, output: calls.update({name: (args[0], output)})

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    yield calls
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["dit", "sit"])
def test_modulation_is_that_of_the_stock_model(backbone: str) -> None:
    """Rows differ in t and in label; every block, then the final layer."""
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    cutter, stock = Cutter(model, preset), model.backbone
    labels = torch.tensor([0, 3, preset.classes, 9])
    times = torch.tensor(random_timesteps(preset, len(labels)))
    modulation = DiTLayout.of(cutter.spec.config, None).split(cutter.conditioning(times, labels))

    blocks = {str(index): block.norm1 for index, block in enumerate(stock.transformer_blocks)}
    with recorded({**blocks, "final": stock.norm_out, "out": stock.proj_out_2}) as calls:
        stock(torch.randn(len(labels), *preset.latent_shape), times, labels)
    for index, (attention, mlp) in enumerate(modulation.blocks):
        hidden, (normed, *rest) = calls[str(index)]
        torch.testing.assert_close(modulated_norm(hidden, attention), normed, **CLOSE)
        for vector, stock_vector in zip((attention.gate, mlp.shift, mlp.scale - 1, mlp.gate), rest, strict=True):
            torch.testing.assert_close(vector.squeeze(1), stock_vector, **CLOSE)
    torch.testing.assert_close(modulated_norm(calls["final"][0], modulation.final), calls["out"][0], **CLOSE)


def test_bindings() -> None:
    slice_ = slice_conditioning(Cutter(shared_tiny_model(), tiny_preset()).context)
    inputs = [(spec.name, spec.dtype, spec.shape) for spec in slice_.inputs]
    assert inputs == [("timestep", "float32", ("rows",)), ("class_labels", "int64", ("rows",))]
    assert slice_.outputs == ("modulation",)
