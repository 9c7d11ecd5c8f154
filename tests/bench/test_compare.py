"""A benchmark's numbers belong together; how large they are is the machine's business."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.bench.compare import compare, with_conditioning
from dyexport.bench.latency import BenchReport
from dyexport.bench.memory import MemoryProbe, added_bytes
from dyexport.bench.report import bench_tables
from dyexport.bench.settings import BenchSettings
from dyexport.bench.variants import compiled_variant, conditioning_variant
from dyexport.bundle.manifest import DENSE
from dyexport.bundle.manifest_file import MANIFEST, manifest_text
from dyexport.bundle.reader import Bundle
from dyexport.engines.fake import FakeEngine
from dyexport.errors import DyexportError, UsageError
from dyexport.runtime.loading import load
from dyexport.runtime.stock import example_inputs, stock_transformer
from tests.bench.text import rendered


@pytest.fixture(scope="module")
def report(built: Bundle) -> BenchReport:
    return compare(built, BenchSettings(rounds=1, steps=4, compiled=False, trajectory=True))


def test_dynamic_time_is_the_mean_over_the_trajectory(report: BenchReport) -> None:
    assert sum(s.share for s in report.segments) == pytest.approx(1)
    mean = sum(s.share * s.seconds for s in report.segments)
    assert report.seconds["dynamic"] == pytest.approx(mean)
    assert report.speedup_vs_dense == pytest.approx(report.seconds["dense"] / mean)
    assert report.speedup_vs_eager == pytest.approx(report.seconds["eager"] / mean)


def test_realized_is_speedup_times_network_ratio(report: BenchReport, built: Bundle) -> None:
    assert report.network_flops_ratio == built.manifest.plan.network_flops_ratio
    assert report.realized == pytest.approx(report.speedup_vs_dense * report.network_flops_ratio)


def test_segments_tell_what_is_in_their_engines(report: BenchReport, built: Bundle) -> None:
    for time, segment in zip(report.segments, built.manifest.plan.segments, strict=True):
        kept = sum(len(heads) for heads in segment.heads)
        assert (time.start, time.end) == (segment.start, segment.end)
        assert time.heads == pytest.approx(kept / built.widths.heads[0].size)
        assert 0 < time.tokens <= 1


def test_overhead_and_memory_are_measured(report: BenchReport) -> None:
    assert 0 < report.switch_overhead < 1
    for value in (report.resident_bytes, report.dense_bytes, report.trajectory_speedup):
        assert (value or 0) > 0
    assert report.speedup_vs_torch_compile is None


def test_json_has_what_is_promised(report: BenchReport) -> None:
    promised = {
        "flops_ratio",
        "network_flops_ratio",
        "speedup_vs_dense",
        "speedup_vs_torch_compile",
        "realized",
        "switch_overhead",
        "resident_bytes",
        "dense_bytes",
    }
    assert promised <= json.loads(json.dumps(asdict(report), allow_nan=False)).keys()


def test_tables_show_the_numbers(report: BenchReport) -> None:
    text = rendered(*bench_tables(report))
    for value in (f"{report.speedup_vs_dense:.2f}x", f"{report.realized:.2f}", f"{report.network_flops_ratio:.3f}"):
        assert value in text


def test_threads_are_put_back(built: Bundle) -> None:
    before = torch.get_num_threads()
    with pytest.raises(DyexportError):
        compare(built, BenchSettings(target="fake", threads=before + 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["batch", "steps", "threads", "rounds"])
def test_settings_out_of_range_are_bad_usage(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name} is 0"):
        BenchSettings(**{name: 0})


def test_dense_graph_is_the_dense_network(built: Bundle) -> None:
    """The baseline equals the stock module with the same weights, so the comparison is with the right thing."""
    from diffusers import DiTTransformer2DModel

    static = DiTTransformer2DModel.from_pretrained(built.root.with_name("work") / "static").eval()
    inputs = example_inputs(built.manifest.model, 3, 0.3)
    with torch.no_grad():
        expected = static(**inputs).sample
    torch.testing.assert_close(load(built.root, dense=True)(**inputs).sample, expected, atol=1e-4, rtol=0)


def test_a_bundle_without_baseline_is_refused(built: Bundle, tmp_path: Path) -> None:
    shutil.copytree(built.root, tmp_path / "copy")
    engines = tuple(engine for engine in built.manifest.engines if engine.network != DENSE)
    assert len(engines) == len(built.manifest.engines) - 1
    manifest = built.manifest.model_copy(update={"engines": engines})
    (tmp_path / "copy" / MANIFEST).write_bytes(manifest_text(manifest))
    with pytest.raises(UsageError, match="no dense graph to compare with; build it again without --no-baseline"):
        compare(Bundle.open(tmp_path / "copy"), BenchSettings(rounds=1, compiled=False))


def test_each_step_pays_its_share_of_the_conditioning() -> None:
    """Networks that condition themselves at each step have paid already."""
    measured = {"dense": 10.0, "conditioning": 6.0, "segment 0": 4.0, "segment 1": 8.0, "torch.compile": 9.0}
    assert with_conditioning(measured, steps=3) == {
        "dense": 12.0,
        "conditioning": 2.0,
        "segment 0": 6.0,
        "segment 1": 10.0,
        "torch.compile": 9.0,
    }
    assert with_conditioning(measured, steps=1)["dense"] == 16.0


def test_conditioning_is_timed_for_all_steps_at_once(built: Bundle) -> None:
    loaded = load(built.root)
    inner = loaded.conditioner.engine
    loaded.conditioner.engine = engine = FakeEngine(inner.io, inner.run)
    run = conditioning_variant(loaded, batch=2, steps=5)
    assert engine.runs == 0
    output: Any = run()
    assert engine.runs == 1
    assert output["modulation"].shape[0] == 5 * 2
    first, last = built.manifest.model.timestep_range
    for row, t, label in ((0, first, 0), (1, first, 1), (8, last, 0), (9, last, 1)):
        alone = inner.run({"timestep": torch.tensor([t]), "class_labels": torch.tensor([label])})["modulation"]
        torch.testing.assert_close(output["modulation"][row : row + 1], alone)


def test_report_has_the_share_of_the_conditioning(report: BenchReport) -> None:
    assert 0 < report.seconds["conditioning"] < min(report.seconds["dense"], report.seconds["dynamic"])
    assert all(segment.seconds > report.seconds["conditioning"] for segment in report.segments)


def test_stock_module_has_the_bundles_shape(built: Bundle) -> None:
    inputs = example_inputs(built.manifest.model, 2, 0.5)
    shapes = [module(**inputs).sample.shape for module in (stock_transformer(built.manifest.model), load(built.root))]
    assert shapes[0] == shapes[1]


def test_no_compiler_is_no_error(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    spec = built.manifest.model
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        assert compiled_variant(stock_transformer(spec), example_inputs(spec, 2, 0.5), "cpu") is None


def test_memory_errors_come_in_one_sentence(built: Bundle) -> None:
    probe = MemoryProbe(bundle=str(built.root), target="fake", batch=2, threads=1, share_weights=False, dense=True)
    with pytest.raises(DyexportError, match=r"measuring memory failed .*'fake'"):
        added_bytes(probe)
