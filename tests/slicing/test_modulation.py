"""Layouts of the conditioning network's output: what is packed is what is split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dyexport.backbones import BACKBONES
from dyexport.slicing.modulation import ModulationLayout
from dyexport.slicing.slicer import slice_conditioning
from tests.factories import shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter


def layout_of(backbone: str) -> ModulationLayout:
    module = slice_conditioning(Cutter(shared_tiny_model(backbone), tiny_preset(backbone)).context).module
    layout: ModulationLayout = module.layout  # type: ignore[assignment]
    return layout


def tensors(parts: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples and lists, in order."""
    if isinstance(parts, Tensor):
        yield parts
    elif parts is not None:
        for value in parts:
            yield from tensors(value)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_splitting_undoes_packing(backbone: str) -> None:
    layout: Any = layout_of(backbone)
    packed = torch.arange(float(layout.size)).expand(2, -1)  # (B, M)
    assert torch.equal(pack_again(layout, layout.split(packed)), packed)


def pack_again(layout: Any, parts: Any) -> Tensor:
    """Pack what was split: vectors (B, 1, C) lose their token axis."""

    def flat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.flatten(1)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(flat, value))
        return [flat(item) for item in value] if value is not None else None

    return layout.pack(flat(parts))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_layout_has_no_column_twice(backbone: str) -> None:
    layout: Any = layout_of(backbone)
    parts = layout.split(torch.arange(float(layout.size)).expand(1, -1))
    columns = torch.cat([value.flatten() for value in tensors(parts)])
    assert columns.sort().values.tolist() == list(range(layout.size))
