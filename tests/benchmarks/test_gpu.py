"""The GPU benchmark on a CPU at tiny sizes: all of its code but compilation and the capture of CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import CASES, main
from benchmarks.gpu.cases import CaseName, fill, make_case
from benchmarks.gpu.summary import summarize
from benchmarks.gpu.timing import require_finite
from benchmarks.gpu.with_torch import fitting, network_inputs, stock_module
from dyexport.errors import DyexportError, UsageError

TINY = ("sit-digits:all:2:2", "dit-digits:capacity:2:2", "flux-tiny:capacity:1:2", "latte-tiny:all:1:2")
DEFAULTS = sorted({case for cases in CASES.values() for case in cases.split(",")})


def run(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    main(["--device", "cpu", "--out", str(folder), "--rounds", "1", "--repeats", "1", "--steps", "4", *arguments])
    records: dict[str, dict[str, Any]] = json.loads((folder / "gpu.json").read_text())
    return records


@pytest.mark.parametrize("text", DEFAULTS)
def test_default_cases_are_planned_at_full_size(text: str) -> None:
    """Widths, segments, networks without memory: all that comes before a GPU is touched."""
    case = make_case(CaseName.parse(text), 0.5)
    assert case.plan.flops_ratio == pytest.approx(0.5, abs=0.005)
    assert case.plan.flops_ratio < case.plan.network_flops_ratio <= case.plan.executed_flops_ratio < 1
    ratios = [case.executed_ratio(segment) for segment in case.segments]
    assert len(ratios) == case.name.engines
    assert all(0 < ratio < 1 for ratio in ratios)
    sizes = {name: piece.nbytes for name, piece in case.networks.items()}
    assert list(sizes) == ["conditioning", *(f"segment {i}" for i in range(case.name.engines)), "dense"]
    assert all(size < sizes["dense"] for name, size in sizes.items() if name.startswith("segment"))
    assert next(stock_module(case).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("text", TINY)
def test_every_backbone_is_timed(text: str, tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--sections", "torch", "--cases", text).values()
    assert "failure" not in record, record
    assert record["left_out"] == []
    assert sum(engine["share"] for engine in record["engines"]) == pytest.approx(1)
    assert {"command", "date", "device", "torch", "commit", "took"} <= record.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("text", TINY)
def test_networks_are_compiled_and_captured(text: str, tmp_path: Path) -> None:
    main(["--device", "cuda", "--out", str(tmp_path), "--sections", "torch", "--cases", text])
    (record,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    assert "failure" not in record, record


@pytest.mark.build
@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may run there")
def test_a_section_that_fails_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    case = "sit-digits:all:2:1"
    records = run(tmp_path, "--sections", "tensorrt,onnxruntime", "--cases", case)
    assert "failure" in records[f"tensorrt {case}"]
    assert records[f"onnxruntime {case}"]["seconds"]["dense"] > 0
    assert (tmp_path / "gpu.md").read_text().count(f"| {case} |") == 2


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may run there")
def test_plans_are_built_and_refused_for_want_of_a_driver(tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--sections", "tensorrt-rtx", "--cases", "flux-tiny:capacity:1:1").values()
    assert "TensorRT cannot load" in record["failure"]
    assert "CUDA driver" in record["failure"]


def test_unknown_cases_and_those_out_of_time_are_lines_too(tmp_path: Path) -> None:
    records = run(tmp_path, "--sections", "torch", "--cases", "dit-nano:all:2")
    assert "dit-nano" in records["torch dit-nano:all:2"]["failure"]
    records = run(tmp_path, "--sections", "torch", "--cases", "dit-digits:all:2", "--seconds", "0")
    assert records["torch dit-digits:all:2"]["failure"] == "not begun: out of time"
    assert len(records) == 2, "records of an earlier run stay"


@pytest.mark.parametrize("text", ["dit-xl-2", "dit-xl-2:some:2", "dit-xl-2:all:two", "dit-xl-2:all:2:3:4"])
def test_case_names(text: str) -> None:
    with pytest.raises(UsageError, match="such as dit-xl-2:all:2"):
        CaseName.parse(text)


@pytest.mark.parametrize("model", ["dit-xl-2/4+8", "flux/4", "flux/4+x"])
def test_blocks_are_flux_s(model: str) -> None:
    with pytest.raises(UsageError, match="such as flux/4"):
        _ = CaseName.parse(f"{model}:all:1").preset


def test_blocks_of_flux() -> None:
    name = CaseName.parse("flux/4+8:all:1:2")
    assert (name.preset.depth, name.engines, name.batch) == (12, 2, 1)


def test_realised_is_one_where_every_flop_saved_is_time_saved() -> None:
    case = make_case(CaseName.parse("dit-digits:all:2:2"), 0.5)
    shares = [case.executed_ratio(segment) for segment in case.segments]
    seconds = {"dense": 1.0, "diffusers": 1.5, "eager": 3.0, "conditioning": 0.0}
    record = summarize(case, {**seconds, **{f"segment {i}": share for i, share in enumerate(shares)}}, steps=50)
    assert record["measure"] == "dense", "the faster of the compiled static models"
    assert [engine["realised"] for engine in record["engines"]] == pytest.approx([1.0, 1.0])
    assert record["realised_of_executed"] == pytest.approx(1.0)
    assert record["speedups"]["eager"] == pytest.approx(3 * record["speedup"])
    assert record["realised"] < 1, "unions of units are FLOPs that a gate would have saved"


def test_what_fits_beside_diffusers_module() -> None:
    sizes = {"conditioning": 5, "segment 0": 20, "dense": 40}
    assert fitting(sizes, stock=40, free=None) == list(sizes)
    assert fitting(sizes, stock=40, free=132) == list(sizes)
    assert fitting(sizes, stock=40, free=131) == ["conditioning", "segment 0"]
    with pytest.raises(DyexportError, match="name fewer blocks"):
        fitting(sizes, stock=40, free=80)


@torch.no_grad()
def test_noise_keeps_its_size_through_a_network() -> None:
    case = make_case(CaseName.parse("dit-digits:all:2:1"), 0.5, "fp32")
    module = fill(case.networks["dense"].module, "cpu")
    (sample,) = module(**network_inputs(case, "dense", "cpu", 1))
    require_finite(sample)
    assert 1e-3 < float(sample.abs().mean()) < 1e3
    with pytest.raises(DyexportError, match="not finite"):
        require_finite((sample, sample / 0))
