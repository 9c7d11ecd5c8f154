"""A benchmark's numbers belong together; how large they are is the machine's business."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.bench.case import first_calls
from dyexport.bench.compare import compare
from dyexport.bench.memory import MemoryProbe, added_bytes
from dyexport.bench.rows import BenchReport, Row, payload, trusted
from dyexport.bench.settings import BenchSettings, parse_batches, parse_sizes
from dyexport.bench.statistics import Ratio, with_conditioning
from dyexport.bench.tables import bench_csv, bench_tables, save_report
from dyexport.bench.variants import DTYPES, conditioning_variant, stock_variant
from dyexport.bundle.manifest import DENSE
from dyexport.bundle.manifest_file import MANIFEST, manifest_text
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import Precision
from dyexport.engines.fake import FakeEngine
from dyexport.errors import DyexportError, UsageError
from dyexport.progress import Progress
from dyexport.runtime.loading import load
from dyexport.runtime.stock import example_inputs, stock_transformer
from tests.bench.text import rendered

PhaseReports = dict[str, list[tuple[int, int]]]


@pytest.fixture(scope="module")
def measured(built: Bundle) -> tuple[BenchReport, PhaseReports]:
    """One comparison for all assertions, and the progress that each of its phases reported."""
    reports: PhaseReports = {}

    @contextmanager
    def phase(name: str) -> Iterator[Progress]:
        yield lambda done, total: reports.setdefault(name, []).append((done, total))

    settings = BenchSettings(rounds=4, steps=4, batches=(2, 1), compiled=False, trajectory=True)
    return compare(built, settings, phase), reports


@pytest.fixture(scope="module")
def report(measured: tuple[BenchReport, PhaseReports]) -> BenchReport:
    return measured[0]


def test_each_phase_reports_its_progress(measured: tuple[BenchReport, PhaseReports]) -> None:
    """The memory phase too, which starts a process for each whole network."""
    report, reports = measured
    for case in ("1 of 2", "2 of 2"):
        for name in ("first calls", "timing", "whole loops", "memory"):
            done, totals = zip(*reports[f"{name} of case {case}"], strict=True)
            assert done == tuple(range(totals[0]))
            assert set(totals) == {totals[0]}
    assert len(reports["memory of case 1 of 2"]) == len([row for row in report.rows if row.batch == 2])


def steps(report: BenchReport, batch: int = 2) -> dict[str, Row]:
    return {row.variant: row for row in report.rows if row.unit == "step" and row.batch == batch}


def test_every_case_has_every_variant(report: BenchReport, built: Bundle) -> None:
    engines = [f"segment {index}" for index in range(len(built.manifest.plan.segments))]
    for batch in (2, 1):
        assert list(steps(report, batch)) == ["dynamic", "dense", "conditioning", *engines, "eager"]
        loops = [row.variant for row in report.rows if (row.unit, row.batch) == ("trajectory", batch)]
        assert loops == ["dynamic", "dense"]


def test_dynamic_time_is_the_mean_over_the_trajectory(report: BenchReport) -> None:
    rows = steps(report)
    engines = [row for row in rows.values() if row.segment is not None]
    assert sum(row.segment.share for row in engines if row.segment) == pytest.approx(1)
    for percentile in ("p25", "p50", "p90", "p99"):
        mean = sum(row.segment.share * getattr(row.timing, percentile) for row in engines if row.segment)
        assert getattr(rows["dynamic"].timing, percentile) == pytest.approx(mean)


def test_speedups_are_ratios_of_the_rows(report: BenchReport) -> None:
    rows = steps(report)
    dynamic = rows["dynamic"]
    for name, ratio in (("dense", dynamic.over_dense), ("eager", dynamic.over_eager)):
        assert ratio is not None
        assert ratio.low <= ratio.high
        if ratio.value is not None:
            assert ratio.value == pytest.approx(rows[name].timing.p25 / dynamic.timing.p25)
    assert dynamic.over_compiled is None
    assert rows["dense"].over_dense is None


def test_throughput_is_of_whole_samples(report: BenchReport) -> None:
    for row in report.rows:
        calls = report.steps if row.unit == "step" else 1
        assert row.samples_per_second == pytest.approx(row.batch / (row.timing.p50 * calls))


def test_percentiles_rise_and_calls_are_counted(report: BenchReport) -> None:
    for row in report.rows:
        times = row.timing
        assert 0 < times.p25 <= times.p50 <= times.p90 <= times.p99
        assert row.calls == (4 * 4 if row.unit == "step" else 4)
        assert row.variant == "conditioning" or (row.first_call or 0) > 0


def test_realized_is_speedup_times_network_ratio(report: BenchReport, built: Bundle) -> None:
    assert report.network_flops_ratio == built.manifest.plan.network_flops_ratio
    speedup = trusted(report.headline.over_dense)
    assert report.realized == (None if speedup is None else pytest.approx(speedup * report.network_flops_ratio))


def test_segments_tell_what_is_in_their_engines(report: BenchReport, built: Bundle) -> None:
    shares = [row.segment for row in steps(report).values() if row.segment is not None]
    for share, segment in zip(shares, built.manifest.plan.segments, strict=True):
        kept = sum(len(heads) for heads in segment.heads)
        assert (share.start, share.end) == (segment.start, segment.end)
        assert share.heads == pytest.approx(kept / built.widths.heads[0].size)
        assert 0 < share.tokens <= 1


def test_overhead_and_memory_are_measured(report: BenchReport) -> None:
    overhead = report.switch_overhead["onnx"]
    assert overhead is not None
    assert 0 < overhead < 1
    for variant in ("dynamic", "dense"):
        memory = steps(report)[variant].memory
        assert memory is not None
        assert (memory.resident_bytes or 0) > 0
        assert (memory.device_bytes, memory.device_reason) == (None, "runs on the CPU")
        assert (memory.shared_bytes is not None) == (variant == "dynamic")
    assert all(row.memory is None for row in report.rows if row.unit == "trajectory")


def test_energy_is_measured_or_has_a_reason(report: BenchReport) -> None:
    for row in report.rows:
        assert (row.energy.joules is None) == (row.energy.reason is not None)


def test_json_has_what_is_promised(report: BenchReport) -> None:
    promised = {
        "flops_ratio",
        "network_flops_ratio",
        "speedup_vs_dense",
        "speedup_vs_torch_compile",
        "realized",
        "switch_overhead",
        "resident_bytes",
        "device_bytes",
        "joules_per_sample",
        "p50",
        "p90",
        "p99",
        "samples_per_second",
        "environment",
        "warnings",
        "rows",
    }
    found = json.loads(json.dumps(payload(report), allow_nan=False))
    assert promised <= found.keys()
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert len(found["rows"]) == len(report.rows)


def test_tables_show_the_numbers(report: BenchReport) -> None:
    text = rendered(*bench_tables(report), width=250)
    for row in report.rows:
        assert f"{row.timing.p50 * 1e3:.1f}" in text
    assert str(report.headline.over_dense) in text
    assert f"{report.network_flops_ratio:.3f}" in text


def test_names_are_whole_in_eighty_columns(report: BenchReport) -> None:
    doubtful = Ratio(value=None, low=17.01, high=342.58)
    first = replace(report.headline, over_dense=doubtful, over_compiled=doubtful, over_eager=doubtful)
    rows = (first, *report.rows[1:], replace(report.rows[-1], target="diffusers", variant="torch.compile"))
    text = rendered(*bench_tables(replace(report, rows=rows)), width=80)
    names = {row.variant for row in rows if row.segment is None}
    assert [name for name in names if not re.search(rf"^ *\S+ +{re.escape(name)} ", text, re.MULTILINE)] == []


def test_a_ratio_that_cannot_be_trusted_is_not_printed(report: BenchReport) -> None:
    doubtful = replace(report.headline, over_dense=Ratio(value=None, low=1.31, high=1.92))
    changed = replace(report, rows=(doubtful, *report.rows[1:]))
    assert "not trusted (1.31x to 1.92x)" in rendered(*bench_tables(changed), width=250)
    assert payload(changed)["speedup_vs_dense"] is None
    assert payload(changed)["realized"] is None
    assert next(csv.DictReader(io.StringIO(bench_csv(changed))))["over_dense"] == ""


def test_a_file_is_written_by_its_suffix(report: BenchReport, tmp_path: Path) -> None:
    warned = replace(report, warnings=("other processes took 12% of CPU time",))
    for suffix in (".json", ".md", ".csv"):
        save_report(warned, tmp_path / f"report{suffix}")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(payload(warned)))
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.index("Warning: other processes") < markdown.index("| target |")
    records = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [record["variant"] for record in records] == [row.variant for row in report.rows]
    assert [float(record["p99"]) for record in records] == [row.timing.p99 for row in report.rows]


def test_threads_are_put_back(built: Bundle) -> None:
    before = torch.get_num_threads()
    with pytest.raises(DyexportError):
        compare(built, BenchSettings(targets=("tensorrt",), threads=before + 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["steps", "threads", "rounds"])
def test_settings_out_of_range_are_bad_usage(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name} is 0"):
        BenchSettings(**{name: 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": (1, 0)}, "--batch is 0"),
        ({"batches": (2, 2)}, "--batch names 2 twice"),
        ({"targets": ("paper",)}, "unknown target 'paper'"),
        ({"targets": ("onnx", "onnx")}, "--target names onnx twice"),
        ({"sizes": ((100, 64),)}, "--size is 100"),
        ({"device": "gpu"}, "--device is 'gpu'; use cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, "--device is 'cuda:'"),
    ],
)
def test_settings_that_make_no_sense_are_bad_usage(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        BenchSettings(**settings)


def test_lists_are_parsed() -> None:
    assert parse_batches("1,2, 8") == (1, 2, 8)
    assert parse_sizes("512,768x1024") == ((512, 512), (768, 1024))


@pytest.mark.parametrize("text", ["", "1,,2", "x", "-1", "1.5", "512x", "9" * 5000])
def test_other_lists_are_bad_usage(text: str) -> None:
    for parse in (parse_batches, parse_sizes):
        with pytest.raises(UsageError, match="not a whole number"):
            parse(text)


def test_dense_graph_is_the_dense_network(built: Bundle) -> None:
    """The baseline equals the stock module with the same weights, so the comparison is with the right thing."""
    from diffusers import DiTTransformer2DModel

    static = DiTTransformer2DModel.from_pretrained(built.root.with_name("work") / "static").eval()
    inputs = example_inputs(built.manifest.model, 3, 0.3)
    with torch.no_grad():
        expected = static(**inputs).sample
    torch.testing.assert_close(load(built.root, dense=True)(**inputs).sample, expected, atol=1e-4, rtol=0)


def test_a_bundle_without_baseline_is_timed_without_ratios(built: Bundle, tmp_path: Path) -> None:
    shutil.copytree(built.root, tmp_path / "copy")
    engines = tuple(engine for engine in built.manifest.engines if engine.network != DENSE)
    assert len(engines) == len(built.manifest.engines) - 1
    manifest = built.manifest.model_copy(update={"engines": engines})
    (tmp_path / "copy" / MANIFEST).write_bytes(manifest_text(manifest))
    settings = BenchSettings(rounds=1, steps=2, compiled=False, eager=False, trajectory=True)
    report = compare(Bundle.open(tmp_path / "copy"), settings)
    assert {row.variant for row in report.rows} == {"dynamic", "conditioning", *engines_of(built)}
    assert all(row.over_dense is None for row in report.rows)
    assert any("no dense network" in warning for warning in report.warnings)
    assert payload(report)["speedup_vs_dense"] is None
    assert "over dense" not in rendered(*bench_tables(report), width=250)


def engines_of(bundle: Bundle) -> list[str]:
    return [f"segment {index}" for index in range(len(bundle.manifest.plan.segments))]


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
    rows = steps(report)
    conditioning = rows["conditioning"].timing.p25
    assert 0 < conditioning < min(rows["dense"].timing.p25, rows["dynamic"].timing.p25)
    assert all(row.timing.p25 > conditioning for row in rows.values() if row.segment is not None)


def test_stock_module_has_the_bundles_shape(built: Bundle) -> None:
    inputs = example_inputs(built.manifest.model, 2, 0.5)
    shapes = [module(**inputs).sample.shape for module in (stock_transformer(built.manifest.model), load(built.root))]
    assert shapes[0] == shapes[1]


def test_no_compiler_is_no_error(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled = torch.compile(stock_transformer(built.manifest.model), dynamic=False)
    variants = {
        ("diffusers", "torch.compile"): stock_variant(compiled, built.manifest.model, 2, "cpu"),
        ("diffusers", "other"): lambda: None,
    }
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        seconds = first_calls(variants, iter(range(9)).__next__)
    assert list(variants) == list(seconds) == [("diffusers", "other")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_diffusers_runs_in_the_precision_of_the_bundle(built: Bundle, precision: Precision) -> None:
    spec = built.manifest.model.model_copy(update={"precision": precision})
    module = stock_transformer(spec).to(DTYPES[precision])
    seen = []
    stock_variant(lambda **inputs: seen.append(module(**inputs).sample.dtype), spec, 2, "cpu")()
    assert seen == [DTYPES[precision]]


def test_memory_errors_come_in_one_sentence(built: Bundle) -> None:
    probe = MemoryProbe(bundle=str(built.root), target="fake", batch=2, threads=1, share_weights=False, dense=True)
    with pytest.raises(DyexportError, match=r"measuring memory failed .*'fake'"):
        added_bytes(probe)
