"""What Torch-TensorRT is given: programs that are the slim modules with their weights. Compiling them takes a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dyexport.bundle.plan import TokenPath
from dyexport.bundle.plan_info import Profile
from dyexport.bundle.tensors import TensorSpec
from dyexport.exporters.exported_program import export_program, outputs_of
from dyexport.exporters.onnx_graph import STORE
from dyexport.exporters.torch_program import compiled_input
from dyexport.exporters.weight_store import write_store
from dyexport.slicing.slicer import Slice, slice_conditioning
from dyexport.slicing.store_layout import lay_out
from tests.exporters.networks import half_width
from tests.factories import shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter

CUTTER = Cutter(shared_tiny_model(), tiny_preset())
SIZES = {"slots": 4}


def export(slice_: Slice, folder: Path) -> torch.export.ExportedProgram:
    layout = lay_out(slice_.recipes.values())
    write_store(layout, CUTTER.read, folder / STORE)
    offsets = {name: layout.offsets[recipe] for name, recipe in slice_.recipes.items()}
    return export_program(slice_, offsets, folder / STORE)


def inputs_for(slice_: Slice, size: int) -> dict[str, torch.Tensor]:
    """Noise, and classes; every free dimension of this size but the slots."""
    shapes = {s.name: [SIZES.get(d, size) if isinstance(d, str) else d for d in s.shape] for s in slice_.inputs}
    noise = {s.name: torch.rand(shapes[s.name]) for s in slice_.inputs}
    return {s.name: noise[s.name].mul(9).to(getattr(torch, s.dtype)) for s in slice_.inputs}


@torch.no_grad()
@pytest.mark.parametrize("path", ["masked", "dynamic", "capacity", "conditioning"])
def test_a_program_is_the_slim_module_at_every_batch(path: TokenPath, tmp_path: Path) -> None:
    cut = CUTTER.cut
    slice_ = slice_conditioning(CUTTER.context) if path == "conditioning" else cut(half_width(CUTTER.preset, path))
    program = export(slice_, tmp_path)
    assert {weight.device.type for weight in slice_.module.parameters()} == {"meta"}, "left as it was"
    run, module = program.module(), slice_.load(CUTTER.read)
    for size in (1, 2, 5):
        inputs = inputs_for(slice_, size)
        found, wanted = run(*inputs.values()), module(**inputs)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_outputs_have_the_inputs_free_sizes(tmp_path: Path) -> None:
    slice_ = CUTTER.cut(half_width(CUTTER.preset, "dynamic"))
    sample, kept = outputs_of(export(slice_, tmp_path), slice_)
    assert (sample.name, sample.dtype, sample.shape) == ("sample", "float32", ("batch", 4, 8, 8))
    assert (kept.name, kept.dtype, kept.shape) == ("kept_tokens", "int64", ("batch", 3))


def test_inputs_are_named_with_their_profile() -> None:
    stand_in = SimpleNamespace(Input=dict)
    profiles = {"batch": Profile(min=1, opt=2, max=8)}
    free = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    fixed = TensorSpec(name="g", dtype="float32", shape=(7,))
    sizes = {"min_shape": (1, 3), "opt_shape": (2, 3), "max_shape": (8, 3), "dtype": torch.float32}
    assert compiled_input(stand_in, free, profiles) == sizes
    assert compiled_input(stand_in, fixed, profiles) == {"shape": (7,), "dtype": torch.float32}
