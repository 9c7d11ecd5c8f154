"""``--quantize``: bundles compute what the fake-quantized masked model does, and say what quantization costs."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dyexport.bundle.manifest import CONDITIONING, DENSE_CONDITIONING
from dyexport.bundle.manifest_file import RANGES
from dyexport.bundle.plan import segment_name
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import Quantization
from dyexport.calibration.quantization import Ranges
from dyexport.cli import main
from dyexport.errors import BundleError, UsageError
from dyexport.exporters.onnx_graph import STORE
from dyexport.pipeline.build import calibrate_model, opened, price_plans
from dyexport.pipeline.export_stages import planned_networks, quantization_ranges, segment_plan
from dyexport.pipeline.networks import Network
from dyexport.pipeline.run import Run
from dyexport.stages.ledger import NullListener
from dyexport.verification.report import QUANTIZED
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import build, tamper, tiny_settings

SETTINGS = VerifySettings(timesteps=8)


ENGINES: dict[Quantization, int] = {"int8": 2, "fp8": 1}


@pytest.fixture(scope="module", params=ENGINES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    kind: Quantization = request.param
    root = tmp_path_factory.mktemp(kind)
    return build(tiny_settings(root, engines=ENGINES[kind], token_path="masked", quantize=kind))


def last_segment(bundle: Bundle) -> str:
    return segment_name(len(bundle.manifest.plan.segments) - 1)


def test_a_bundle_equals_the_fake_quantized_model(bundle: Bundle) -> None:
    report = verify_bundle(bundle.root, SETTINGS)
    assert report.passed
    assert report.tolerance == QUANTIZED
    assert report.quantization_ratio is not None
    assert report.quantization_ratio < 0.5, "two blocks are too few for what rounding decides to spread"
    assert report.relative_error is not None
    assert 1e-3 < report.relative_error < 0.05, "quantized, and no more than that"


def test_what_quantization_costs_is_in_the_plan(bundle: Bundle) -> None:
    """As measured on the masked model; the engines' own error, on other inputs, is of that size."""
    report = verify_bundle(bundle.root, SETTINGS)
    errors = bundle.manifest.plan.quantization_errors
    for predicted, segment in zip(errors, report.segments, strict=True):
        assert predicted < 1e-3, "relative MSE"
        assert segment.relative_error is not None
        assert predicted**0.5 / 4 < segment.relative_error < 4 * predicted**0.5


def test_a_copied_bundle_equals_the_outputs_that_it_keeps(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.root, copy)
    report = verify_bundle(copy, VerifySettings())
    assert report.passed
    assert report.reference is None
    assert report.quantization_ratio is not None
    assert report.quantization_ratio < 0.5
    assert all(segment.compared for segment in report.segments)


def quantized_networks(run: Run) -> list[Network]:
    model = calibrate_model(run)
    plan = segment_plan(run, model)
    return planned_networks(run.settings, model, plan, quantization_ranges(run, model, plan))


def test_every_network_has_ranges_but_conditioning(tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path, engines=2, quantize="fp8", baseline=True), NullListener()) as run:
        networks = {network.name: network.slice.ranges for network in quantized_networks(run)}
    assert not networks.pop(CONDITIONING)
    assert not networks.pop(DENSE_CONDITIONING, None)
    assert set(networks) == {"segment-00", "segment-01", "dense"}
    assert all(len(ranges) == 8 and min(ranges.values()) > 0 for ranges in networks.values())


@pytest.mark.parametrize("bundle", ["int8"], indirect=True)
def test_onnx_runtime_multiplies_in_int8(bundle: Bundle, tmp_path: Path) -> None:
    """Every linear layer of attention and MLP, and nothing is left to be dequantized."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(bundle.root / "graphs/segment-00.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = Counter(
        node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    )
    assert (nodes["QGemm"], nodes["QuantizeLinear"], nodes["DequantizeLinear"]) == (8, 8, 0)


def test_a_file_without_ranges(tmp_path: Path) -> None:
    (tmp_path / "ranges.json").write_text("{}")
    with pytest.raises(BundleError, match="copy the bundle again, or build it again"):
        Ranges.read(tmp_path / "ranges.json")


def test_wrong_codes_fail(bundle: Bundle, tmp_path: Path) -> None:
    """One weight in sixteen of the second block's MLP has its sign turned."""
    shutil.copytree(bundle.root.parent, tmp_path / "copy")
    copy = Bundle.open(tmp_path / "copy" / bundle.root.name)
    graph = onnx.load(copy.root / f"graphs/{last_segment(copy)}.onnx", load_external_data=False).graph
    weight = next(tensor for tensor in graph.initializer if tensor.name == "blocks.1.fc2.weight")
    entries = {entry.key: int(entry.value) for entry in weight.external_data if entry.key != "location"}

    def negate(content: bytes) -> bytes:
        store = np.frombuffer(bytearray(content), np.uint8)
        codes = store[entries["offset"] : entries["offset"] + entries["length"] : 16]
        codes[:] = 256 - codes.astype(np.int16) if weight.data_type == onnx.TensorProto.INT8 else codes ^ 128
        return store.tobytes()

    tamper(copy.root, f"graphs/{STORE}", negate)
    assert not verify_bundle(copy.root, SETTINGS).passed


def test_wrong_ranges_fail(bundle: Bundle, tmp_path: Path) -> None:
    """Those of one layer's inputs are a tenth of what the engines were built with."""
    shutil.copytree(bundle.root.parent, tmp_path / "copy")
    copy = Bundle.open(tmp_path / "copy" / bundle.root.name)

    def shrink(content: bytes) -> bytes:
        ranges = json.loads(content)
        ranges["networks"][last_segment(copy)]["blocks.1.fc2.weight"] /= 10
        return json.dumps(ranges).encode()

    tamper(copy.root, RANGES, shrink)
    report = verify_bundle(copy.root, SETTINGS)
    assert report.quantization_ratio is not None
    assert report.quantization_ratio > 0.5


def test_layers_are_not_compared_in_eight_bits(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"is in (int8|fp8); leave it out"):
        verify_bundle(bundle.root, VerifySettings(timesteps=1, layers=True))


def test_eight_bits_are_fewer_bytes(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path, token_path="masked"), NullListener()) as run:
        whole = price_plans(run, [len(bundle.manifest.plan.segments)])[0].plan
    assert bundle.manifest.plan.resident_bytes < 0.7 * whole.resident_bytes
    assert bundle.manifest.plan.disk_bytes < whole.disk_bytes


@pytest.mark.parametrize("bundle", ["int8"], indirect=True)
def test_commands_say_that_it_is_quantized(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dyexport", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        return capsys.readouterr().out

    verify = ("verify", str(bundle.root), "--timesteps", "2")
    assert "over that of quantization" in shown(*verify)
    report = json.loads(shown(*verify, "--json"))
    assert (report["quantization"], report["error"]) == ("int8", report["quantization_ratio"])
    assert "fp32, linear layers in int8" in " ".join(shown("inspect", str(bundle.root)).split())
    assert json.loads(shown("inspect", str(bundle.root), "--json"))["quantization"] == "int8"
