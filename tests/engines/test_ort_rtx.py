"""ONNX Runtime's TensorRT-RTX provider: what it says where it cannot run, and what its cache is keyed by."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import onnxruntime
import pytest
import torch

import dyexport
from dyexport.engines.base import WeightSpan
from dyexport.engines.ort_rtx import (
    CONTEXT,
    OrtRtxEngine,
    compiled_graphs,
    context_entries,
    context_key,
    filling,
    incompatibility,
    kernel_settings,
)
from dyexport.errors import EngineMismatchError, StorageError
from tests.engines.on_gpu import gpu_engines
from tests.engines.tiny import Store, make_inputs, make_weights, whole_segment, write_onnx
from tests.runtime.bundles import make_inputs as pipeline_inputs
from tests.runtime.bundles import write_bundle

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="needs the rtx extra")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="may run there")


@pytest.mark.tensorrt
@without_gpu
def test_a_machine_without_a_driver_is_told_so_in_one_sentence(tmp_path: Path) -> None:
    """Of the real provider, which is asked to register."""
    reason = incompatibility()
    assert reason is not None
    assert reason.startswith("ONNX Runtime cannot load its TensorRT-RTX provider (libcuda")
    assert reason.endswith("install NVIDIA's driver, or use --target onnx")
    assert incompatibility() == reason, "asking again gives the same answer"


@pytest.mark.tensorrt
@without_gpu
def test_a_bundle_falls_back_to_plain_onnx_runtime(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    inputs = pipeline_inputs(2)
    with pytest.warns(UserWarning, match=r"TensorRT-RTX provider .*; running its ONNX graphs"):
        transformer = dyexport.load(bundle.root, target="onnx-rtx")
    torch.testing.assert_close(transformer(**inputs).sample, bundle(**inputs).sample, atol=1e-4, rtol=0)
    strict = dyexport.load(bundle.root, target="onnx-rtx", fallback=False)
    with pytest.raises(EngineMismatchError, match="cannot load its TensorRT-RTX provider"):
        strict(**inputs)


def test_a_compiled_graph_is_used_for_nothing_else(tmp_path: Path) -> None:
    store = tmp_path / "weights.bin"
    store.write_bytes(b"1234")
    spans = (WeightSpan(path=store, offset=0, length=4),)
    key = context_key(b"graph", spans, {"provider": "1"})
    assert key == context_key(b"graph", spans, {"provider": "1"})
    others = {context_key(b"other", spans, {"provider": "1"}), context_key(b"graph", spans, {"provider": "2"})}
    os.utime(store, (1, 1))
    others.add(context_key(b"graph", spans, {"provider": "1"}))
    assert len(others - {key}) == 3


def killed_halfway(out: Path) -> None:
    with filling(out) as folder:
        (folder / CONTEXT).write_text("half")
        raise RuntimeError("killed")


def test_a_compiled_graph_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "cache" / "key"
    with pytest.raises(RuntimeError, match="killed"):
        killed_halfway(out)
    assert list(out.parent.iterdir()) == []
    with filling(out) as folder:
        (folder / CONTEXT).write_text("first")
        assert not out.exists()
    with filling(out) as folder:
        (folder / CONTEXT).write_text("second")
    assert (out / CONTEXT).read_text() == "first", "another process was faster"
    assert list(out.parent.iterdir()) == [out]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot keep a compiled graph in"), filling(tmp_path / "file" / "key"):
        pass


def test_the_provider_knows_where_to_keep_kernels(tmp_path: Path) -> None:
    """Its options are in a header of its package; nothing else names them without a GPU."""
    header = files("onnxruntime_ep_nv_tensorrt_rtx") / "tensorrt_rtx_provider_options.h"
    (option,) = kernel_settings(tmp_path)
    assert f'"{option}"' in header.read_text()
    assert Path(kernel_settings(tmp_path)[option]).is_dir()


def test_kernels_are_not_kept_where_there_is_no_folder(tmp_path: Path) -> None:
    assert kernel_settings(tmp_path / "absent") == {}


def test_onnx_runtime_knows_the_settings(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    for key, value in context_entries(tmp_path / CONTEXT).items():
        options.add_session_config_entry(key, value)
        assert options.get_session_config_entry(key) == value


@pytest.mark.gpu
def test_the_second_session_starts_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYEXPORT_CACHE", str(tmp_path / "cache"))
    graph = tmp_path / "segment-00.onnx"
    write_onnx(graph, make_weights(), whole_segment(gated=False), Store(tmp_path / "weights.bin"))
    gpu_engines("onnx-rtx", graph)  # skips where it cannot run
    samples = []
    for _ in range(2):
        with OrtRtxEngine(graph) as engine:
            inputs = {name: tensor.cuda() for name, tensor in make_inputs(2).items()}
            samples.append(engine.run(inputs)["sample"].cpu())
    assert len(list(compiled_graphs().iterdir())) == 1
    torch.testing.assert_close(*samples)
