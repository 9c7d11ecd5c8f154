"""Programs that AOTInductor compiles: every backbone's networks, with weights as inputs and none inside."""

from __future__ import annotations

import pytest
import torch

from dyexport.backbones import BACKBONES
from dyexport.bundle.plan import TokenPath
from dyexport.errors import EngineBuildError, UsageError
from dyexport.exporters.torch_package import check_compiler, export_code, typical_sizes
from dyexport.slicing.slicer import Slice, slice_conditioning, slice_segment
from tests.exporters.networks import half_width, slice_context
from tests.factories import shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter

CUTTER = Cutter(shared_tiny_model(), tiny_preset())


def export(slice_: Slice, sizes: dict[str, int] | None = None) -> torch.export.ExportedProgram:
    return export_code(slice_, tuple(sorted(slice_.recipes)), sizes=sizes or {})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_programs_have_no_weights(backbone: str) -> None:
    """And none was read or allocated: the module has none."""
    preset = tiny_preset(backbone)
    context, segment = slice_context(preset), half_width(preset, "compact")
    for slice_, where in ((slice_segment(context, segment), segment), (slice_conditioning(context), None)):
        program = export(slice_, typical_sizes(context.spec, where, slice_))
        assert program.state_dict == {}
        assert program.constants == {}
        assert len(program.graph_signature.user_inputs) == len(slice_.recipes) + len(slice_.inputs)


@torch.no_grad()
@pytest.mark.parametrize("path", ["masked", "dynamic", "capacity", "compact"])
def test_programs_are_the_slim_module_at_every_batch(path: TokenPath) -> None:
    slice_ = CUTTER.cut(half_width(CUTTER.preset, path))
    module = slice_.load(CUTTER.read)
    run = export(CUTTER.cut(half_width(CUTTER.preset, path))).module()
    weights = [module.state_dict()[name] for name in sorted(slice_.recipes)]
    for batch in (1, 2, 5):
        sizes = {"batch": batch, "slots": 4}
        shapes = {s.name: [sizes[d] if isinstance(d, str) else d for d in s.shape] for s in slice_.inputs}
        inputs = {name: torch.rand(shape) for name, shape in shapes.items()}
        torch.testing.assert_close(run(*weights, *inputs.values()), module(**inputs), atol=1e-5, rtol=0)


def test_typical_sizes_are_of_one_picture_under_guidance() -> None:
    preset = tiny_preset("flux")
    context, segment = slice_context(preset), half_width(preset, "compact")
    sizes = typical_sizes(context.spec, segment, slice_segment(context, segment))
    assert sizes["batch"] == 2
    assert sizes["image_tokens"] == preset.tokens
    assert len(set(sizes.values())) == len(sizes)


def test_without_a_compiler_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineBuildError, match=r"compiles C.* with no-such-compiler.* run: apt-get install"):
        check_compiler()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_compiled_for() -> None:
    with pytest.raises(UsageError, match="--device is cuda, and torch sees no GPU; use --device cpu, or install torch"):
        check_compiler("cuda")
