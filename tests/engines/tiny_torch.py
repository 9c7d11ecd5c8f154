"""The tiny network as a torch module, compiled to a package in a folder that is laid out as a bundle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dyexport.bundle.package_info import PACKAGE
from dyexport.bundle.plan import Segment
from dyexport.digests import sha256_of
from dyexport.exporters.torch_package import build_package
from dyexport.slicing.recipes import Recipe
from dyexport.slicing.slicer import Slice
from tests.engines.tiny import CHANNELS, DEPTH, FEATURES, SIZE, Store, Weights, kept_units, tiny_io, write_onnx


class TinyNetwork(nn.Module):
    """Ungated blocks, with weights named as in the graph."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        for block in range(DEPTH):
            units = len(kept_units(segment, block))
            for name, shape in (("first", (units, FEATURES)), ("time", (units,)), ("second", (units, FEATURES))):
                setattr(self, f"{name}{block}", nn.Parameter(torch.empty(shape, device="meta")))

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.flatten(1) + modulation[:, :FEATURES]  # (B, F)
        kept = []
        for block in range(DEPTH):
            first, time, second = (getattr(self, f"{name}{block}") for name in ("first", "time", "second"))
            kept.append((x > 0).sum(1))
            hidden = (x @ first.T + modulation[:, FEATURES:] * time).relu()  # (B, units)
            x = x + hidden @ second  # (B, F)
        return x.reshape(-1, CHANNELS, SIZE, SIZE), torch.stack(kept, 1)


def tiny_slice(segment: Segment) -> Slice:
    module = TinyNetwork(segment)
    recipes = {
        name: Recipe(kind="copy", sources=(name,), shape=tuple(value.shape))
        for name, value in module.named_parameters()
    }
    io = tiny_io(segment)
    return Slice(
        module=module,
        recipes=recipes,
        inputs=io.inputs,
        outputs=tuple(o.name for o in io.outputs),
        limits={"batch": 64},
    )


def package_of(root: Path, name: str = "segment-00") -> Path:
    return root / "engines/torch" / name / PACKAGE


def build_tiny_package(root: Path, weights: Weights, segment: Segment) -> None:
    """Write the graph, the store and the package of a network."""
    package = package_of(root)
    graph = root / "graphs" / f"{package.parent.name}.onnx"
    graph.parent.mkdir(parents=True)
    package.parent.parent.mkdir(parents=True)
    write_onnx(graph, weights, segment, Store(graph.parent / "weights.bin"))
    build_package(tiny_slice(segment), package.parent, sizes={}, precision="fp32", graph_sha256=sha256_of(graph))
