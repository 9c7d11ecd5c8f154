"""The torch modules of a bundle, rebuilt from the bundle alone, against its ONNX graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING
from dyexport.bundle.reader import Bundle
from dyexport.compilation.base import BundleNetworks
from dyexport.compilation.modules import SlimModule, bundle_module, slim_module
from dyexport.engines.ort import OrtEngine
from dyexport.errors import BundleError, EngineBuildError
from dyexport.exporters.examples import example_sizes
from dyexport.lora import LoraSpec
from tests.pipeline.tiny import build, tiny_settings
from tests.test_runtime_only import BUILD, ROOT

LORA = LoraSpec(rank=2, experts=3, alpha=4)


def random_inputs(module: SlimModule, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise, and small integers, of the sizes that a module is traced with."""
    sizes, generator = example_sizes(module.slice), torch.Generator().manual_seed(seed)
    shapes = {s.name: [sizes[d] if isinstance(d, str) else d for d in s.shape] for s in module.slice.inputs}
    noise = {s.name: torch.rand(shapes[s.name], generator=generator) for s in module.slice.inputs}
    return {s.name: noise[s.name].mul(5).to(getattr(torch, s.dtype)) for s in module.slice.inputs}


@torch.no_grad()
def assert_modules_equal_graphs(bundle: Bundle, *, atol: float = 2e-5) -> None:
    for network, graph in bundle.engine_paths("onnx").items():
        module = bundle_module(bundle, network)
        inputs = random_inputs(module)
        outputs = module.load()(**inputs)
        values = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        computed = dict(zip(module.slice.outputs, values, strict=True))
        expected = OrtEngine(graph).run(inputs)
        assert computed.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(computed[name], value, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("name", ["sit_tiny", "flux_tiny", "latte_tiny", "qwen_image_tiny"])
def test_modules_equal_the_graphs_of_every_network(name: str, request: pytest.FixtureRequest) -> None:
    assert_modules_equal_graphs(request.getfixturevalue(name))


def test_with_a_low_rank_path_and_its_dense_network(tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, engines=2, baseline=True, td_lora=LORA))
    assert {DENSE, DENSE_CONDITIONING, CONDITIONING} < bundle.engine_paths("onnx").keys()
    assert_modules_equal_graphs(bundle)


def test_with_merged_segments(tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, engines=2, td_lora=LORA, merge_tolerance=1.0))
    assert all(segment.merged for segment in bundle.manifest.plan.segments)
    assert_modules_equal_graphs(bundle)


def test_weights_are_views_of_the_mapped_store(sit_tiny: Bundle) -> None:
    module = bundle_module(sit_tiny, "segment-00")
    loaded = module.load()
    storages = {weight.untyped_storage().data_ptr() for weight in loaded.state_dict().values()}
    assert len(storages) == 1
    assert loaded.state_dict().keys() == module.offsets.keys()
    assert {weight.device.type for weight in module.slice.module.parameters()} == {"meta"}


def test_no_library_that_builds_bundles_is_needed(sit_tiny: Bundle) -> None:
    script = f"""
import sys
from tests.without import Without
sys.meta_path[:] = [Without(finder, frozenset({BUILD!r})) for finder in sys.meta_path]
from dyexport.bundle.reader import Bundle
from dyexport.compilation.modules import bundle_module
bundle = Bundle.open({str(sit_tiny.root)!r})
for network in bundle.engine_paths("onnx"):
    bundle_module(bundle, network).load()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_networks_are_refused(sit_tiny: Bundle) -> None:
    with pytest.raises(BundleError, match="no network 'segment-07'"):
        bundle_module(sit_tiny, "segment-07")


def test_a_graph_of_another_network_is_refused(sit_tiny: Bundle) -> None:
    """Another segment has other widths, and the conditioning network other names."""
    networks, paths = BundleNetworks.of(sit_tiny), sit_tiny.engine_paths("onnx")
    with pytest.raises(BundleError, match=r"float32 .* in the graph and float32"):
        slim_module(networks, "segment-00", paths["segment-01"])
    with pytest.raises(BundleError, match="is only in"):
        slim_module(networks, "segment-00", paths[CONDITIONING])


def test_quantized_bundles_are_refused_with_the_cure(tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, quantize="int8"))
    with pytest.raises(EngineBuildError, match=r"quantized to int8.*choose a target made from graphs, such as onnx"):
        bundle_module(bundle, "segment-00")
