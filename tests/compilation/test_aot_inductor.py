"""Target ``torch`` in full, for `make packages`: every backbone, in fp32 and bf16, on every token path."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.backbones.base import Preset
from dyexport.bundle.package_info import PACKAGE_INFO
from dyexport.bundle.reader import Bundle
from dyexport.compilation.api import compile_engines
from dyexport.engines.registry import make_engines
from dyexport.engines.torch_rt import incompatibility
from dyexport.errors import BundleError, UsageError
from dyexport.presets import get_preset
from dyexport.runtime.loading import load
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.manifests import forge
from tests.pipeline.tiny import TINY, build, shallow, tamper, tiny_settings
from tests.runtime.calls import predict

pytestmark = [pytest.mark.slow, pytest.mark.aot_inductor]

FEW_BLOCKS: dict[str, Preset] = {
    "dit": replace(get_preset("dit-digits"), layers=2),
    "sit": TINY,
    **{name: shallow(f"{name.replace('_', '-')}-tiny") for name in ("latte", "flux", "qwen_image")},
}


@pytest.fixture(scope="session")
def compiled(sit_tiny_torch: Bundle) -> Bundle:
    return sit_tiny_torch


def test_engines_equal_the_masked_model(compiled: Bundle, sit_tiny: Bundle) -> None:
    settings = VerifySettings(timesteps=24, target="torch")
    assert verify_bundle(compiled.root, settings, reference=find_reference(sit_tiny)).passed


@pytest.mark.parametrize("dense", [False, True])
def test_engines_equal_those_of_the_graphs(compiled: Bundle, dense: bool) -> None:
    graphs = load(compiled.root, dense=dense)
    with closing(graphs), closing(load(compiled.root, target="torch", dense=dense)) as packages:
        assert packages.device == torch.device("cpu")
        for t in (0.01, 0.4, 0.99):
            torch.testing.assert_close(predict(packages, t), predict(graphs, t), atol=1e-5, rtol=0)


def test_weights_are_in_memory_once(compiled: Bundle) -> None:
    """The bound holds all engines together, but not the sum of their weights."""
    paths = list(compiled.engine_paths("torch").values())
    engines = make_engines("torch", paths)
    spans = {span for engine in engines for span in engine.weights}
    store = (compiled.root / "graphs/weights.bin").stat().st_size
    total = sum(span.length for engine in engines for span in engine.weights)
    assert {span.path for span in spans} == {compiled.root / "graphs/weights.bin"}
    assert total > store
    with closing(load(compiled.root, target="torch", memory=store)) as transformer:
        for t in (0.01, 0.4, 0.99):
            predict(transformer, t)
        residency = transformer.residency
        assert sum(engine.active for engine in residency.engines) == len(residency.engines)
        assert residency.weight_bytes <= store


def test_packages_hold_no_weights(compiled: Bundle) -> None:
    """A package of a slim network and of the dense one have the same size but for code."""
    sizes = {name: path.stat().st_size for name, path in compiled.engine_paths("torch").items()}
    assert max(sizes.values()) < 2 * min(sizes.values())


def test_compiled_engines_are_up_to_date(compiled: Bundle) -> None:
    before = {path: path.stat().st_mtime_ns for path in compiled.engine_paths("torch").values()}
    again = compile_engines(compiled.root, "torch")
    assert {path: path.stat().st_mtime_ns for path in again.engine_paths("torch").values()} == before


@pytest.fixture
def copied(compiled: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(compiled.root, tmp_path / "bundle")


def name_of(bundle: Bundle, network: str, file: str) -> str:
    return bundle.engine_paths("torch")[network].with_name(file).relative_to(bundle.root).as_posix()


def test_hashes_are_checked_even_if_not_asked_for(compiled: Bundle, copied: Path) -> None:
    package = copied / name_of(compiled, "segment-00", "model.pt2")
    package.write_bytes(package.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="does not match its hash"):
        load(copied, target="torch", check_hashes=False)


def test_code_of_another_torch_gives_way_to_the_graphs(compiled: Bundle, copied: Path) -> None:
    for network in compiled.engine_paths("torch"):
        name = name_of(compiled, network, PACKAGE_INFO)
        tamper(copied, name, lambda text: text.replace(torch.__version__.encode(), b"2.0.0"))
    assert "compiled by torch 2.0.0" in str(incompatibility(copied / name_of(compiled, "segment-00", "model.pt2")))
    with pytest.warns(UserWarning, match="compiled by torch 2.0.0.*running its ONNX graphs"):
        transformer = load(copied, target="torch")
    with closing(transformer), closing(load(compiled.root)) as graphs:
        torch.testing.assert_close(predict(transformer, 0.4), predict(graphs, 0.4), atol=1e-6, rtol=0)


def test_packages_of_another_graph_are_refused(compiled: Bundle, copied: Path) -> None:
    tamper(
        copied,
        name_of(compiled, "segment-00", PACKAGE_INFO),
        lambda text: text.replace(b'graph_sha256": "', b'graph_sha256": "0'),
    )
    with pytest.raises(BundleError, match="was not built from the bundle's graph"):
        load(copied, target="torch")


def test_packages_elsewhere_are_refused(compiled: Bundle, copied: Path) -> None:
    """An engine finds its weights by where its package is."""

    def swap(manifest: dict[str, Any]) -> None:
        for engine in manifest["engines"]:
            if engine["target"] == "torch" and engine["network"] == "segment-00":
                engine["path"] = "model.pt2"
        old = name_of(compiled, "segment-00", "model.pt2")
        manifest["files"]["model.pt2"] = manifest["files"].pop(old)
        manifest["files"]["model.json"] = manifest["files"].pop(old.replace("model.pt2", PACKAGE_INFO))

    for file in ("model.pt2", PACKAGE_INFO):
        (copied / name_of(compiled, "segment-00", file)).rename(copied / file)
    forge(copied, swap)
    with pytest.raises(BundleError, match="is not where the package of 'segment-00' belongs"):
        load(copied, target="torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_another_device_is_refused_with_the_cure(compiled: Bundle) -> None:
    with pytest.raises(UsageError, match="compiled for cpu; use cpu, or compile them for cuda: dyexport compile"):
        load(compiled.root, target="torch", device="cuda")


def verified(folder: Path, **settings: Any) -> float:
    """Build with target ``torch``, and return the error relative to the tolerance."""
    bundle = build(tiny_settings(folder, targets=("torch",), **settings))
    report = verify_bundle(bundle.root, VerifySettings(timesteps=16, target="torch"), reference=find_reference(bundle))
    assert report.passed, report
    return report.error / report.tolerance


@pytest.mark.parametrize(
    ("model", "precision", "path"),
    [
        ("dit", "fp32", "masked"),
        ("dit", "bf16", "compact"),
        ("sit", "fp32", "dynamic"),
        ("sit", "bf16", "capacity"),
        ("sit", "fp16", "masked"),
        ("latte", "fp32", "capacity"),
        ("latte", "bf16", "masked"),
        ("flux", "fp32", "compact"),
        ("flux", "bf16", "dynamic"),
        ("qwen_image", "fp32", "dynamic"),
        ("qwen_image", "bf16", "compact"),
    ],
)
def test_every_backbone(model: str, precision: str, path: str, tmp_path: Path) -> None:
    """Also in bf16, for which ONNX Runtime has no CPU kernels; every token path in fp32 and in bf16."""
    assert 0 < verified(tmp_path, model=FEW_BLOCKS[model], precision=precision, token_path=path) < 0.5


def test_real_width(tmp_path: Path) -> None:
    verified(tmp_path, model=replace(get_preset("dit-s-2"), layers=2))
